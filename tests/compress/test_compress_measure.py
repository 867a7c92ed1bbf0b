"""Measured iterations: what is compared, what is counted between two real ranks, and what is made of the numbers."""

from __future__ import annotations

import dataclasses
import math
import re
import weakref
from collections import Counter
from pathlib import Path

import pytest
import torch
from torch import nn

from llmsys import compose, job, schema
from llmsys.comm.group import group
from llmsys.comm.place import Place
from llmsys.compress.kernels_cost import Rates
from llmsys.compress.measure import figures, fit, predicted, tables, turns
from llmsys.compress.measure import task as tasks
from llmsys.compress.measure.paced import Pace, PacedModel
from llmsys.compress.measure.stack import Forward
from llmsys.compress.measure.turns import Samples
from llmsys.compress.measure.variants import DEFAULT_MIB, WHOLE_MIB, Attached, Variant, variants
from llmsys.compress.paper_models import MODELS, PaperModel, Parameter
from llmsys.compress.simulate import predict
from llmsys.cost import pace
from llmsys.cost.links import Line
from rank_pool import Pool

FREE = Rates(flops_per_s=float("inf"), bytes_per_s=float("inf"), launch_s=0.0)
NOOP, PLAIN, ACP = (Variant(method, 1, True, 4, 32) for method in ("noop", "none", "acpsgd"))


def test_what_a_setting_means_nothing_to_is_measured_once() -> None:
    task = schema.Iteration(
        methods=["none", "acpsgd", "powersgd_packed", "torch_powersgd"], bucket_mib=[0, 4], overlap=[True, False]
    )
    found = variants(task, [4, 8], [32])
    assert found[:3] == [Variant("noop", mib, True, 4, 32) for mib in (0, 4, WHOLE_MIB)]
    by_method = Counter(variant.method for variant in found)
    assert by_method == {"noop": 3, "none": 4, "acpsgd": 8, "powersgd_packed": 2, "torch_powersgd": 2}
    assert {v.r for v in found if v.method == "none"} == {4}
    assert {(v.bucket_mib, v.overlap) for v in found if v.method == "torch_powersgd"} == {(WHOLE_MIB, True)}


@pytest.mark.parametrize("variant", [PLAIN, Variant("powersgd_packed", WHOLE_MIB, False, 32, 8)])
def test_a_variant_is_known_by_its_name(variant: Variant) -> None:
    assert Variant.parse(variant.name) == variant


def samples(step_s: float, **more: float) -> Samples:
    own = {key: [value] * 2 for key, value in more.items()}
    return Samples(step_s=[[step_s], [step_s]], calls=Counter(all_reduce=4), bytes=Counter(all_reduce=2_000_000), **own)


def test_an_iteration_is_computation_compression_and_waiting() -> None:
    """At 4 ranks 1 MB a step is 1.5 MB on each link, 12 ms at 1 Gbit/s."""
    found = figures.measured(
        {
            NOOP: Samples(step_s=[[0.010, 0.010]], calls=Counter(), bytes=Counter()),
            PLAIN: samples(0.030),
            ACP: samples(0.014, compress_s=0.002, decompress_s=0.003, exposed_s=0.001),
        },
        world=4,
        mbit=1000,
    )
    own = {key.removeprefix(ACP.name + "/"): value for key, value in found.items() if key.startswith(ACP.name)}
    assert own["exposed_ms"] == pytest.approx(1)
    assert own["wire_bytes"] == 1_500_000
    assert own["bound_ms"] == own["wire_ms"] == pytest.approx(12)
    assert own["over_bound_percent"] == pytest.approx(100 / 6)
    assert own["recovered_percent"] == pytest.approx(80)  # 16 of the 20 ms that S-SGD loses
    assert own["collectives"] == 2
    assert found[f"{NOOP.name}/over_bound_percent"] == pytest.approx(0)


def test_tables_have_a_line_for_each_variant_and_say_what_is_not_known() -> None:
    whole = figures.measured({NOOP: samples(0.01), PLAIN: samples(0.02), ACP: samples(0.015)}, world=4, mbit=None)
    text = tables.markdown({f"bert_base/{key}": value for key, value in whole.items()}, 4)
    assert "## bert_base, 4 ranks" in text
    assert "| acpsgd | 1 | 4 | 32 | 15.0 (15.0 to 15.0) |" in text
    assert "1.33x" in text  # S-SGD takes 20 ms
    assert "link's rate" not in text


def test_a_fit_is_told_as_the_command_that_simulates_with_it() -> None:
    fit = figures.fitted(
        {"all_reduce": Line(2e-5, 8e-9)}, {"acpsgd, r=4": Rates(flops_per_s=1, bytes_per_s=5e9, launch_s=0)}
    )
    (command,) = re.findall("`python -m llmsys (.*)`", tables.markdown(fit, 4))
    assert command.split()[1:] == [
        "task.alpha_s=2e-05",
        "task.beta_bytes_per_s=1.25e+08",
        "task.gamma_bytes_per_s=5e+09",
    ]
    task = schema.build(compose.compose(command.split())).task
    assert isinstance(task, schema.Simulate)
    assert task.beta_bytes_per_s == 1.25e8


def test_a_paced_pass_takes_what_its_flops_take_and_waits_for_hooks(monkeypatch: pytest.MonkeyPatch) -> None:
    clock = [0.0]
    monkeypatch.setattr("time.perf_counter", lambda: clock[0])
    monkeypatch.setattr("time.sleep", lambda s: clock.__setitem__(0, clock[0] + s))
    hook = [0.0]
    clocked = Pace(lambda: hook[0])
    clocked.begin()
    clocked.take(1.0)
    assert clock[0] == 1.0
    clock[0] += 0.25  # Python's own time is made up for
    clocked.take(1.0)
    assert clock[0] == 2.0
    clock[0] += 0.5
    hook[0] += 0.5  # a hook's is not
    clocked.take(1.0)
    assert clock[0] == 3.5


def test_a_paced_model_has_each_gradient_in_reverse_and_later_leaves_it_alone() -> None:
    shapes = [Parameter("a.weight", (3, 4), 6.0), Parameter("b.bias", (5,))]
    model = PacedModel(shapes, batch=2, flops_per_s=None, device=torch.device("cpu"), seed=1)
    order: list[str] = []
    for name, parameter in model.named_parameters():
        parameter.register_post_accumulate_grad_hook(lambda _, name=name: order.append(name))
    for _ in range(3):
        model(turns.token(torch.device("cpu"))).backward()
        before = [p.grad.clone() for p in model.parameters() if p.grad is not None]
    assert order[:2] == ["b/bias", "a/weight"]
    model(turns.token(torch.device("cpu"))).backward()
    assert all(torch.equal(p.grad, old) for p, old in zip(model.parameters(), before, strict=True))
    assert [tuple(p.shape) for p in model.parameters()] == [(3, 4), (5,)]


def prediction(variant: Variant, rates: Rates, beta_s: float) -> float:
    """ms of an iteration of two layers of 1 MiB, one bucket each, with 3 ms in both passes."""
    layers = [Parameter(f"{i}", (512, 512), 1.0) for i in range(2)]
    model = PaperModel(title="", make=lambda: iter(layers), batch=1, r=4)
    found = predicted.iteration(
        variant,
        schema.Iteration(),
        model,
        passes_s=0.003,
        rates=rates,
        lines={"all_reduce": Line(0.0, beta_s)},
        world=2,
    )
    return found.total_s * 1e3


def test_a_prediction_has_the_passes_and_the_link_behind_the_first_bucket() -> None:
    """Forward 1 ms and two backward of 1 ms; at two ranks each bucket is 1 MiB on the link."""
    ms = 1e-3 / 2**20  # so that a bucket takes 1 ms
    assert prediction(PLAIN, FREE, 0.0) == pytest.approx(3)
    assert prediction(PLAIN, FREE, 10 * ms) == pytest.approx(1 + 1 + 2 * 10)
    assert prediction(dataclasses.replace(PLAIN, overlap=False), FREE, 10 * ms) == pytest.approx(3 + 2 * 10)
    assert prediction(PLAIN, FREE, 0.1 * ms) == pytest.approx(3 + 0.1)  # hidden but for the last


def forgotten(place: Place) -> bool:
    """Whether nothing is left of a variant's model when its turn is over."""
    import gc

    left = []

    def make(variant: Variant) -> tuple[nn.Module, Forward]:
        model = PacedModel([Parameter("a", (64, 64))], 1, None, torch.device("cpu"), 1)
        left.append(weakref.ref(model))
        return model, lambda wrapped: wrapped(turns.token(torch.device("cpu")))

    with group(place, torch.device("cpu")):
        for variant in (NOOP, PLAIN, ACP, dataclasses.replace(ACP, overlap=False)):
            turns.turn(variant, schema.Replay(), make, Samples(), lambda: None, update=False)
    gc.collect()
    return all(model() is None for model in left)


def test_a_turn_leaves_no_model_behind(pool: Pool) -> None:
    """A hook that knows its DDP model keeps it alive for ever, which once took all memory in the tenth turn."""
    assert pool.call("test_compress_measure:forgotten") == [True, True]


def cut(place: Place, name: str, mib: float) -> list[list[str]]:
    """The buckets that DDP makes of a paper's model, on a rank of the pool."""
    model = PacedModel(MODELS[name].parameters, 1, None, torch.device("cpu"), 1)
    with group(place, torch.device("cpu")):
        attached = Attached(Variant("noop", mib, True, 4, 1), schema.Replay(), model)
        for _ in range(3):
            attached.wrapped(turns.token(torch.device("cpu"))).backward()
    return attached.noted


@pytest.mark.parametrize("mib", [4.0, 25.0])
def test_buckets_are_simulated_as_ddp_cuts_them(pool: Pool, mib: float) -> None:
    """25 is its default, with a smaller first bucket."""
    parameters = MODELS["resnet50"].parameters
    ours = predict.ddp_buckets(parameters, mib, predict.FIRST_MIB if mib == DEFAULT_MIB else None)
    theirs, _ = pool.call("test_compress_measure:cut", "resnet50", mib)
    assert [[parameters[i].name.replace(".", "/") for i in bucket] for bucket in ours] == theirs


def test_the_fitted_bandwidth_gives_back_what_was_measured() -> None:
    assert fit._solve(lambda rate: 5.0 / rate + 1e-3, 3e-3) == pytest.approx(2500)


def test_latency_is_the_smallest_messages_and_the_rate_the_largest() -> None:
    """A ring of 4: 6 messages one after another, 1.5 bytes on a link for each of the tensor's. A burst of 100 kB that
    goes for nothing makes those between too early."""
    line = Line(1e-4, 8e-9)
    numbers = [64 * 4**i for i in range(10)]
    seconds = [line.seconds("all_reduce", max(n - 100_000, 64), 4) for n in numbers]
    alpha_s, beta_s = fit._line("all_reduce", numbers, seconds, 4)
    assert alpha_s == pytest.approx(1e-4, rel=0.01)
    assert beta_s == pytest.approx(8e-9, rel=0.02)


def test_messages_of_a_fit_last_no_longer_than_half_a_second() -> None:
    for mbit in (0.1, 100, 10_000, None):
        found = fit.sizes(mbit)
        assert len(found) > 1
        assert found == sorted(set(found))
        assert found[-1] <= fit.LARGEST_BYTES
        if mbit is not None:
            assert found[-1] * 8e-6 / mbit <= fit.LARGEST_S


def test_the_papers_bytes_and_one_collective_a_bucket(pool: Pool, tmp_path: Path) -> None:
    """Table 1: ResNet-50 at r = 4 sends 155.5 and 93.3 times fewer elements with ACP-SGD, 66.5 with Power-SGD."""
    overrides = ["+exp=compress_replay", "network=none", "task.models=[resnet50]", "task.pace=none", "task.fit=false"]
    overrides += ["task.methods=[powersgd,acpsgd]", "task.rounds=1"]
    first, _ = pool.call("rank_runs:run", str(tmp_path), overrides)
    assert first["status"] == "ok", first["error"]
    rows = tables.cells(first["summary"])["resnet50"]
    whole = 4 * sum(math.prod(shape) for _, shape in MODELS["resnet50"].shapes)
    power, acp = (next(row for name, row in rows.items() if name.startswith(each)) for each in ("powersgd/", "acpsgd/"))
    assert acp["buckets"] > 1
    assert acp["collectives"] == acp["buckets"]
    assert power["collectives"] == 2 * power["buckets"]
    assert whole / power["wire_bytes"] == pytest.approx(66.5, abs=0.05)
    assert whole / acp["wire_bytes"] == pytest.approx(2 / (1 / 155.5 + 1 / 93.3), abs=0.1)


@pytest.mark.slow
def test_all_that_can_be_measured_is(pool: Pool, tmp_path: Path) -> None:
    """Every method."""
    overrides = ["+exp=compress_iteration", "network=none", "task.width=64", "task.layers=3", "task.rounds=1"]
    overrides += ["task.steps=2", "task.bucket_mib=[0.02]", "task.fit=false"]
    overrides += ["task.methods=[none,fp16,sign,efsign,topk,randomk,powersgd_packed,powersgd,acpsgd,torch_powersgd]"]
    first, _ = pool.call("rank_runs:run", str(tmp_path), overrides)
    assert first["status"] == "ok", first["error"]
    (rows,) = tables.cells(first["summary"]).values()
    for name, row in rows.items():
        variant = Variant.parse(name)
        assert row["iteration_ms"] > 0
        if variant.method in ("acpsgd", "fp16"):
            assert row["collectives"] == row["buckets"] == 2


@pytest.mark.slow
def test_what_is_ours_is_predicted_from_a_fit(pool: Pool, tmp_path: Path) -> None:
    overrides = ["+exp=compress_iteration", "network=none", "task.width=64", "task.layers=3", "task.rounds=1"]
    overrides += ["task.steps=2", "task.overlap=[true,false]", "task.methods=[none,acpsgd,torch_powersgd]"]
    first, second = pool.call("rank_runs:run", str(tmp_path), overrides)
    assert first["status"] == "ok", first["error"]
    (rows,) = tables.cells(first["summary"]).values()
    for name, row in rows.items():
        assert ("predicted_ms" in row) == (Variant.parse(name).method not in ("noop", "torch_powersgd")), name
    assert "acpsgd, no overlap" in (Path(first["out"]) / "measured.md").read_text()
    fitted = {key: value for key, value in first["summary"].items() if key.startswith("fit/")}
    assert fitted["fit/acpsgd, r=4/gamma_gb_per_s"] > 0.1
    assert fitted["fit/all_reduce/mbit"] > 100
    assert fitted == {key: value for key, value in second["summary"].items() if key.startswith("fit/")}


@pytest.mark.slow
def test_a_whole_model_is_measured_too(alone: Pool, tmp_path: Path) -> None:
    overrides = ["+exp=compress_iteration", "network=none", "train.global_batch=8", "model=llama_tiny"]
    overrides += ["task.subject=model", "task.batch=[2]", "task.rounds=1", "task.steps=2", "train.length=16"]
    overrides += ["task.methods=[none,acpsgd]", "task.bucket_mib=[4]", "task.fit=false"]
    (run,) = alone.call("rank_runs:run", str(tmp_path), overrides)
    assert run["status"] == "ok", run["error"]
    (rows,) = tables.cells(run["summary"]).values()
    assert {Variant.parse(name).method for name in rows} == {"noop", "none", "acpsgd"}
    assert all(row["iteration_ms"] > 0 for row in rows.values())


@pytest.mark.parametrize(
    ("overrides", "key"),
    [
        (["engine=fsdp2"], "engine.kind=fsdp2"),
        (["compress=acpsgd"], "compress.kind=acpsgd"),
        (["task.methods=[acp]"], "task.methods=acp"),
        (["task.steps=3"], "task.steps=3"),
        (["task.density=0"], "task.density=0"),
        (["task.subject=model", "model=resnet_tiny", "data=digits"], "model.family"),
    ],
)
def test_what_cannot_be_measured_is_refused_by_its_key(overrides: list[str], key: str) -> None:
    with pytest.raises(ValueError, match=key):
        schema.build(compose.compose(["+exp=compress_iteration", *overrides]))


@pytest.mark.parametrize(
    ("overrides", "reason"),
    [
        (["network=home", "hardware.mem_gib=64"], "time"),
        (["hardware.mem_gib=1", "task.models=[bert_large]"], "memory"),
    ],
)
def test_what_would_take_too_much_says_so_first(overrides: list[str], reason: str) -> None:
    config = schema.build(compose.compose(["+exp=compress_replay", *overrides]))
    task = config.task
    assert isinstance(task, schema.Replay)
    subject = tasks.replayed(task, "bert_large", torch.device("cpu"), 0)
    with pytest.raises(tasks.Refused) as refused:
        tasks.check(config, [subject], torch.device("cpu"))
    assert refused.value.reason == reason


def test_a_pace_is_a_devices() -> None:
    task = schema.Replay(pace="rtx2080ti", efficiency=0.5)
    assert pace.flops_per_s(task, "cpu") == pytest.approx(6.7e12, rel=0.01)
    with pytest.raises(ValueError, match=r"task\.pace=rtx2080ti: is for ranks on a CPU"):
        pace.flops_per_s(task, "cuda")


@pytest.mark.parametrize(
    ("override", "told"),
    [
        ("task.pace=rtx2080", r"task\.pace=rtx2080: must be none or one of .*rtx2080ti"),
        ("task.precision=bf16", r"task\.precision=bf16: GeForce RTX 2080 Ti has only"),
    ],
)
def test_a_pace_that_there_is_not_is_refused_before_ranks_start(override: str, told: str) -> None:
    with pytest.raises(ValueError, match=told):
        job.make(compose.compose(["+exp=compress_replay", "hardware.device=cpu", "task.pace=rtx2080ti", override]))
