"""Simulated iterations: messages are those that the methods send, times those of the arithmetic, and limits hold."""

from __future__ import annotations

import dataclasses
import math

import pytest
from simulated import SHAPES, Ranks, random_grads

from llmsys import schema
from llmsys.compress.config import CompressConfig
from llmsys.compress.kernels_cost import Rates, work
from llmsys.compress.methods.method import AllGather, AllReduce, AllToAll, Request
from llmsys.compress.paper_models import MODELS
from llmsys.compress.simulate import tables
from llmsys.compress.simulate.clusters import NETWORKS, Cluster
from llmsys.compress.simulate.predict import (
    PACKED,
    RATES_GBIT,
    Machine,
    Plan,
    break_even_gbit,
    messages,
    plan,
    settings,
)
from llmsys.cost import hardware
from llmsys.cost.links import Line
from llmsys.schema.compress import METHODS
from llmsys.schema.task import PAPER_MODELS, SIMULATED, SIMULATED_NETWORKS

DEVICE = Rates(flops_per_s=6.7e12, bytes_per_s=5e11, launch_s=5e-6)
FREE = Rates(flops_per_s=math.inf, bytes_per_s=math.inf, launch_s=0.0)
INSTANT = Line(0.0, 0.0)


def made(method: str, model: str = "resnet50", world: int = 32, compress: Rates = DEVICE, overlap: bool = True) -> Plan:
    paper = MODELS[model]
    config = settings(method, paper, min_rate=0, density=0.001)
    machine = Machine(compute_flops_per_s=6.7e12, compress=compress)
    return plan(paper, method, config, machine, world, bucket_mib=25, overlap=overlap)


def cluster(network: str = "eth10g", world: int = 32) -> Cluster:
    return Cluster(inner=Line.of_rate(15.75, 1e-6), outer=NETWORKS[network].line, world=world, per_machine=4)


def carried(request: Request) -> tuple[str, int]:
    """Kind, and bytes of the whole tensor."""
    match request:
        case AllReduce(buffer):
            return "all_reduce", buffer.numel() * buffer.element_size()
        case AllGather(_, output):
            return "all_gather", output.numel() * output.element_size()
        case AllToAll(_, output):
            return "all_to_all", output.numel() * output.element_size()


@pytest.mark.parametrize("method", METHODS)
def test_messages_are_those_that_the_method_really_sends(method: str) -> None:
    """Round by round, kind and bytes; and as many pieces of work come before them."""
    config = CompressConfig(method=method, r=2, min_rate=0, density=0.1)
    gradients = [(name, tuple(shape), 4) for name, shape in SHAPES.items()]
    ranks = Ranks(config, 2)
    for step in range(2):
        ranks.step([{name: grad.float() for name, grad in rank.items()} for rank in random_grads(2, step)])
        assert messages(gradients, config, 2, step) == [carried(request) for request in ranks.asked]
        assert len(work(gradients, config, DEVICE, 2, step).before) == len(ranks.asked)


def test_acp_sends_one_message_a_bucket_and_power_two() -> None:
    acp, power = made("acpsgd"), made("powersgd")
    for step in acp.steps:
        assert [len(bucket.rounds) for bucket in step] == [1] * 5
    assert [len(bucket.rounds) for bucket in power.steps[0]] == [2] * 5
    assert [len(bucket.rounds) for bucket in made(PACKED).steps[0]] == [2]
    matrices_twice = sum(message.nbytes for bucket in power.steps[0] for message in bucket.rounds)
    halves = sum(message.nbytes for step in acp.steps for bucket in step for message in bucket.rounds)
    vectors = sum(4 * math.prod(shape) for _, shape in MODELS["resnet50"].shapes if len(shape) == 1)
    assert matrices_twice == halves - vectors


@pytest.mark.parametrize("method", SIMULATED)
def test_an_instant_network_and_a_single_rank_leave_the_computation(method: str) -> None:
    instant = Cluster(inner=INSTANT, outer=INSTANT, world=32, per_machine=4)
    for found in (made(method).iteration(instant), made(method, world=1).iteration(cluster(world=1))):
        assert found.wire_s == 0
        parts = (found.forward_s, found.backward_s, found.compress_s, found.decompress_s)
        assert found.total_s == pytest.approx(sum(parts))
        assert found.backward_s == pytest.approx(2 * found.forward_s)


def test_ssgd_without_overlap_is_the_formula_of_a_ring() -> None:
    """Computation + 2 b (p - 1) alpha + 2 (p - 1) / p N beta, for b buckets of N bytes in all on p GPUs."""
    given = made("none", compress=FREE, overlap=False)
    found = given.iteration(cluster())
    line, paper, p = NETWORKS["eth10g"].line, MODELS["resnet50"], 32
    nbytes = 4 * sum(math.prod(shape) for _, shape in paper.shapes)
    computing = 3 * paper.batch * sum(each.flops for each in paper.parameters) / 6.7e12
    wire = 2 * len(given.steps[0]) * (p - 1) * line.alpha_s + 2 * (p - 1) / p * nbytes * line.beta_s
    assert found.total_s == pytest.approx(computing + wire)


@pytest.mark.parametrize("method", SIMULATED)
def test_limits_hold_for_every_method(method: str) -> None:
    """Between the larger of computation and communication, and their sum; faster links are no slower."""
    rates = [made(method).iteration(cluster().at_rate(gbit)) for gbit in (0.1, 1, 10, 100, 1000)]
    for found in rates:
        assert max(found.device_s, found.wire_s) <= found.total_s * (1 + 1e-9)
        assert found.total_s <= (found.device_s + found.wire_s) * (1 + 1e-9)
    totals = [found.total_s for found in rates]
    assert totals == sorted(totals, reverse=True)


@pytest.mark.parametrize("method", ["acpsgd", "powersgd", "topk"])
def test_at_the_break_even_both_take_as_long(method: str) -> None:
    mine, plain = made(method), made("none")
    gbit = break_even_gbit(mine, plain, cluster())
    both = [each.iteration(cluster().at_rate(gbit)).total_s for each in (mine, plain)]
    assert both[0] == pytest.approx(both[1], rel=0.01)
    for factor, faster in ((0.5, True), (2.0, False)):
        at = cluster().at_rate(factor * gbit)
        assert (mine.iteration(at).total_s < plain.iteration(at).total_s) is faster


def test_a_method_may_never_be_faster_or_always() -> None:
    """The same with more work, and with free compression: half of the bytes."""
    plain = made("none")
    slower = dataclasses.replace(plain, forward_s=plain.forward_s + 1e-3)
    assert tables.rate_text(break_even_gbit(slower, plain, cluster())) == "never"
    half = break_even_gbit(made("fp16", compress=FREE), made("none", compress=FREE), cluster())
    assert half == RATES_GBIT[1]
    assert tables.rate_text(half) == "always"


def test_machines_share_a_link_where_ranks_send_to_each_other_directly() -> None:
    """All-to-all of n bytes: 4 ranks' pieces for the 28 others over one link, where a ring's crosses it once."""
    of_four, alone = cluster(), dataclasses.replace(cluster(), per_machine=1)
    n, line = 1e9, NETWORKS["eth10g"].line
    assert alone.seconds("all_to_all", n) == pytest.approx(line.seconds("all_to_all", n, 32))
    assert of_four.seconds("all_to_all", n) == pytest.approx(31 * line.alpha_s + 4 * 28 / 32 * n * line.beta_s)
    assert of_four.seconds("all_reduce", n) == pytest.approx(line.seconds("all_reduce", n, 32))
    assert cluster(world=4).seconds("all_reduce", n) == pytest.approx(
        Line.of_rate(15.75, 1e-6).seconds("all_reduce", n, 4)
    )


@pytest.mark.parametrize(("method", "passes"), [("none", 2), ("fp16", 5), ("powersgd", 11), ("acpsgd", 10)])
def test_work_on_a_large_matrix_is_its_passes_over_memory(method: str, passes: int) -> None:
    """Of a square matrix with r = 1, whose factors are small beside it: what `kernels_cost` says of our methods."""
    config = CompressConfig(method=method, r=1, min_rate=0)
    per_byte = dataclasses.replace(FREE, bytes_per_s=1.0)
    n = 10_000
    found = work([("a", (n, n), 4)], config, per_byte, 8, 0)
    assert sum(found.before) + found.during + found.after == pytest.approx(4 * passes * n * n, rel=2e-3)


def test_power_and_acp_orthogonalise_one_factor_a_step() -> None:
    """Where nothing costs but kernels: 2 r of them for a QR, and Power-SGD's second product and buffer."""
    per_kernel = dataclasses.replace(FREE, launch_s=1.0)
    steps = {}
    for r in (1, 3):
        for method in ("powersgd", "acpsgd"):
            config = CompressConfig(method=method, r=r, min_rate=0)
            found = work([("a", (10, 20), 4)], config, per_kernel, 8, 0)
            steps[method, r] = sum(found.before) + found.during + found.after
    assert steps["powersgd", 3] - steps["powersgd", 1] == steps["acpsgd", 3] - steps["acpsgd", 1] == 4


def test_gathered_signs_cost_each_rank_more_with_every_other_and_a_vote_does_not() -> None:
    gradients = [("a", (4096, 4096), 4)]
    after = {
        (method, world): work(gradients, CompressConfig(method=method), DEVICE, world, 0).after
        for method in ("sign", "efsign")
        for world in (8, 64)
    }
    assert after["sign", 64] == after["sign", 8]
    assert after["efsign", 64] > 6 * after["efsign", 8]


def test_the_papers_averages_are_those_of_its_recalled_table() -> None:
    """So what is shown beside them is averaged as they are."""
    network, world = tables.MAIN
    summary = {
        f"{model}/{network}/{world}/{method}/iteration_ms": float(ms)
        for model, row in tables.RECALLED.items()
        for method, ms in zip(tables.ORDER, row, strict=True)
    }
    assert [round(value, 2) for value in tables.averages(summary).values()] == list(tables.HEADLINES)
    del summary[f"resnet50/{network}/{world}/none/iteration_ms"]
    assert not tables.averages(summary)


@pytest.mark.parametrize(("model", "images_per_s"), [("resnet50", 294), ("resnet152", 110)])
def test_the_assumed_efficiency_is_near_one_that_others_have_measured(model: str, images_per_s: float) -> None:
    """One RTX 2080 Ti training in fp32 (Lambda, "RTX 2080 Ti Deep Learning Benchmarks with TensorFlow", 2019)."""
    flops = 3 * sum(each.flops for each in MODELS[model].parameters)
    reached = images_per_s * flops / hardware.DEVICES["rtx2080ti"].peak("fp32")
    assert schema.Simulate().efficiency == pytest.approx(reached, rel=0.15)


def test_advice_names_the_fastest_and_says_where_nothing_pays() -> None:
    ms = {"none": 780.0, "powersgd": 220.0, "acpsgd": 200.0, "randomk": 100.0}
    text = tables.advice(tables.Cell("bert_base", "eth10g", 32, ms))
    assert text.startswith(
        "on 10GbE with 32 GPUs and BERT-Base: acpsgd r=32, 3.90x over S-SGD and 1.10x over Power-SGD"
    )
    assert "randomk" in text
    text = tables.advice(tables.Cell("resnet50", "ib100", 8, {"none": 100.0, "acpsgd": 98.0}))
    assert "ResNet-50: none, S-SGD itself" in text


def test_every_name_of_the_settings_is_known_here() -> None:
    assert set(PAPER_MODELS) == set(MODELS)
    assert set(SIMULATED_NETWORKS) == set(NETWORKS)
    assert set(SIMULATED) - {PACKED} == set(METHODS) - {"bf16"}


@pytest.mark.parametrize(
    ("changes", "named"),
    [
        ({"worlds": [8, 10]}, "task.worlds=10: must be a multiple"),
        ({"worlds": [0]}, "task.worlds=0: must be at least 1"),
        ({"models": ["resnet18"]}, "task.models=resnet18"),
        ({"efficiency": 0.0}, "task.efficiency=0.0"),
        ({"beta_bytes_per_s": 1e9}, "task.alpha_s"),
        ({"compute_ms": {"resnet50": -1.0}}, "task.compute_ms.resnet50=-1.0"),
    ],
)
def test_a_wrong_setting_is_named(changes: dict[str, object], named: str) -> None:
    with pytest.raises(ValueError, match=named.replace(".", r"\.")):
        schema.Simulate(**changes)  # type: ignore[arg-type]
