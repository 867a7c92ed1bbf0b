"""Claims about `bench_ops`: the shapes are the model's, a time is known or time is up, keys are regular, and two ranks
report what NCCL's tests would.
"""

from __future__ import annotations

import math
import re
import statistics
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from llmsys import compose, runner, schema
from llmsys import job as jobs
from llmsys.bench.ops import clock, shapes, tables, task
from llmsys.comm import collectives
from llmsys.comm.place import Place
from llmsys.cost import shapes as costs
from llmsys.cost.hardware import DEVICES
from llmsys.schema.modules import COLLECTIVES
from rank_pool import Pool

HERE = "test_bench_ops"
TINY = ["+exp=bench_ops", "model=llama_tiny", "model.num_kv_heads=2", "train.threads=1", "dispatch.kind=process"]
TINY += [
    "train.micro_batch=1",
    "train.length=32",
    "task.sizes_mib=[0.0625,0.25]",
    "task.least_s=1e-4",
    "task.most_s=2e-3",
]
KEYS = (
    r"(gemm|gemm_nn|gemm_tn)/\d+x\d+x\d+/(fp32|bf16)",
    r"bmm/\d+x\d+x\d+x\d+/(fp32|bf16)",
    r"attention(_backward)?/\d+x\d+x\d+x\d+x\d+/(fp32|bf16)",
    r"(softmax|rms_norm|layer_norm)(_backward)?/\d+x\d+/(fp32|bf16)",
    r"memcpy/[a-z0-9_]+/\d+",
    r"(all_reduce|all_gather|reduce_scatter)/\d+",
)


def run(place: Place, results: str, overrides: list[str]) -> dict[str, Any]:
    """One rank; so few cold bytes that operands are made in no time."""
    clock.COLD_BYTES = 2**20
    made = jobs.make(compose.compose([*TINY, f"train.world={place.world}", f"results={results}", *overrides]))
    record = runner.run(made, place=place)
    text = Path(made.out) / "ops.md"
    return {
        "status": record.status,
        "error": record.error,
        "summary": record.summary,
        "samples": record.samples,
        "notes": record.notes,
        "text": text.read_text() if text.exists() else "",
    }


@pytest.mark.parametrize("family", ["llama", "bert", "gpt2", "t5"])
def test_each_layer_has_three_products(family: str) -> None:
    """Of one size each, T N M, as the forward pass and the two derivatives have it."""
    model = schema.Transformer(family=family, tie_embeddings=family in ("t5", "gpt2"))
    train = schema.Train(length=48, target_length=48, micro_batch=2)
    found = {(gemm.op, gemm.m, gemm.n, gemm.k) for gemm in shapes.gemms(model, train)}
    for layer in costs.linears(model):
        t, n, m = 96, layer.n_in, layer.n_out
        assert {("gemm", t, m, n), ("gemm_nn", t, n, m), ("gemm_tn", m, n, t)} <= found
    heads = {gemm for gemm in found if model.vocab_size in gemm}
    assert len(heads) == (0 if family == "bert" else 3)


def test_a_decoder_reads_two_lengths() -> None:
    """T5's cross-attention makes keys and values of the encoder's tokens, and queries of its own."""
    model = schema.Transformer(family="t5", tie_embeddings=True)
    train = schema.Train(length=100, target_length=30, micro_batch=1)
    rows = {
        gemm.m: gemm.rows for gemm in shapes.gemms(model, train) if gemm.op == "gemm" and gemm.n == 64 and gemm.k == 64
    }
    assert rows == {100: ("qkv", "output"), 30: ("qkv", "output")}
    assert [(each.queries, each.keys) for each in shapes.attentions(model, train)] == [(100, 100), (30, 30), (30, 100)]


class Ticks:
    """A clock that only work moves."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.now, self.calls = 0.0, 0
        monkeypatch.setattr("time.perf_counter", lambda: self.now)

    def work(self, *seconds: float) -> Any:
        def act() -> None:
            self.now += seconds[self.calls % len(seconds)]
            self.calls += 1

        return act


def timer(**settings: Any) -> clock.Clock:
    return clock.Clock(**{"device": torch.device("cpu"), "spread": 0.05, "least_s": 1e-3, "most_s": 1.0, **settings})


def test_times_that_agree_are_taken_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    ticks = Ticks(monkeypatch)
    assert timer().samples([ticks.work(0.01)]) == pytest.approx([0.01] * clock.LEAST)


def test_times_that_do_not_agree_are_taken_until_time_is_up(monkeypatch: pytest.MonkeyPatch) -> None:
    ticks = Ticks(monkeypatch)
    found = timer().samples([ticks.work(0.01, 0.03, 0.02)])
    assert 1.0 <= sum(found) < 1.05


def test_a_long_operator_is_taken_three_times(monkeypatch: pytest.MonkeyPatch) -> None:
    ticks = Ticks(monkeypatch)
    assert len(timer().samples([ticks.work(2.0)])) == clock.FEWEST


def test_a_short_operator_is_taken_many_times_a_sample(monkeypatch: pytest.MonkeyPatch) -> None:
    """A microsecond against a grain of 200: a sample is the mean of 200 calls; sets of operands take turns."""
    ticks = Ticks(monkeypatch)
    turns = [0, 0]
    one = ticks.work(1e-6)

    def act(which: int) -> Any:
        def both() -> None:
            turns[which] += 1
            one()

        return both

    found = timer(least_s=0.0).samples([act(0), act(1)])
    assert found == pytest.approx([1e-6] * clock.LEAST)
    assert ticks.calls == pytest.approx(200 * clock.LEAST, abs=10)
    assert abs(turns[0] - turns[1]) <= 1


def test_operands_exceed_a_cache_together() -> None:
    """Of every size that has to do with memory; and no more of them than that takes."""
    for nbytes in (clock.SMALL, 10**6, 2**20, 3 * 2**20, 2**26, clock.COLD_BYTES, 2 * clock.COLD_BYTES):
        number = clock.copies(nbytes)
        assert number * nbytes >= clock.COLD_BYTES > (number - 1) * nbytes
    assert clock.copies(clock.SMALL - 1) == clock.copies(0) == 1


def test_two_ranks(pool: Pool, tmp_path: Path) -> None:
    """Keys and figures of every operator; busbw is algbw times NCCL's factor: of 2 ranks 1 for all-reduce, else 1/2."""
    found, other = pool.call(f"{HERE}:run", str(tmp_path), ["engine=ddp", "hardware.gbps=10"])
    assert found["status"] == "ok", found["error"]
    operators = tables.operators(found["summary"])
    for key, figures in operators.items():
        assert any(re.fullmatch(pattern, key) for pattern in KEYS), key
        assert all(math.isfinite(value) and value >= 0 for value in figures.values())
        assert figures["ms"] == pytest.approx(statistics.median(found["samples"][f"{key}/ms"]))
        assert figures["ms"] > 0
        assert f"| {key} |" in found["text"]
    assert operators.keys() == tables.operators(other["summary"]).keys()
    for kind, factor in zip(COLLECTIVES, (1.0, 0.5, 0.5), strict=True):
        for nbytes in (65536, 262144):
            figures = operators[f"{kind}/{nbytes}"]
            assert figures["algbw_gb_per_s"] == pytest.approx(nbytes / figures["ms"] * 1e-6)
            assert figures["busbw_gb_per_s"] == pytest.approx(factor * figures["algbw_gb_per_s"])
            assert figures["peak_percent"] == pytest.approx(10 * figures["busbw_gb_per_s"])
            assert other["samples"][f"{kind}/{nbytes}/ms"] == found["samples"][f"{kind}/{nbytes}/ms"], "the slowest's"
    assert found["notes"]["peak_of_links"] == "hardware.gbps=10"
    assert found["notes"]["peak_tflops"].startswith("measured")
    wide = operators["gemm/32x176x64/fp32"]
    assert wide["tflops"] == pytest.approx(2 * 32 * 176 * 64 / wide["ms"] * 1e-9)


def test_one_rank_has_no_collectives_and_says_so(tmp_path: Path) -> None:
    found = run(
        Place(), str(tmp_path), ["engine=local", "train.precision=bf16", "task.operators=[norm,memcpy,collectives]"]
    )
    assert found["status"] == "ok", found["error"]
    assert {key.split("/")[0] for key in tables.operators(found["summary"])} == {
        "rms_norm",
        "rms_norm_backward",
        "memcpy",
    }
    assert "collectives need two ranks" in found["text"]


def test_shares_are_of_the_card_that_runs(monkeypatch: pytest.MonkeyPatch) -> None:
    """On a GPU box nobody types `hardware=`: products, memory, PCIe and NVLink are still held against its datasheet."""
    card = DEVICES["a100"]
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "NVIDIA A100-SXM4-80GB")
    total = int(card.mem_gib * 2**30)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: SimpleNamespace(total_memory=total))
    config = schema.build(compose.compose(["+exp=bench_ops", "engine=ddp", "train.world=8", "train.global_batch=32"]))
    for world, names in ((1, ["memory", "host_link"]), (8, ["memory", "host_link", "links"])):
        context: Any = SimpleNamespace(device=torch.device("cuda"), place=SimpleNamespace(world=world))
        found = task._most(config, context)
        assert list(found) == [f"peak_of_{name}" for name in names]
        rates = [card.gb_per_s, card.pcie_gbps, card.nvlink_gbps]
        assert [peak.per_s / 1e9 for peak in found.values()] == pytest.approx(rates[: len(names)])


def test_too_little_memory_is_said_before(tmp_path: Path) -> None:
    found = run(Place(), str(tmp_path), ["hardware.mem_gib=0.01"])
    assert found["status"] == "skipped"
    assert "a smaller train.micro_batch" in found["error"]


@pytest.mark.parametrize(
    ("override", "complaint"),
    [
        ("model=resnet_tiny", "model.family=resnet: bench_ops is for transformers"),
        ("task.operators=[gem]", r"task.operators=gem: must be one of gemm, attention"),
        ("task.sizes_mib=[0]", r"task.sizes_mib=\[0.0\]: needs sizes"),
        ("task.least_s=2", "task.least_s=2.0: must be positive and not above"),
    ],
)
def test_what_it_cannot_do_is_said(override: str, complaint: str) -> None:
    with pytest.raises(ValueError, match=complaint):
        schema.build(compose.compose(["+exp=bench_ops", override]))


def shared(place: Place) -> list[float]:
    """This rank's share of the ranks' sum."""
    part = torch.empty(2)
    collectives.reduce_scatter(torch.arange(4.0) + 10 * place.rank, part)
    return part.tolist()


def test_a_reduce_scatter_gives_each_rank_its_share_of_the_sum(pool: Pool) -> None:
    """[0 1 2 3] + [10 11 12 13]; alone the tensor itself."""
    assert pool.call(f"{HERE}:shared") == [[10.0, 12.0], [14.0, 16.0]]
    part = torch.empty(2)
    collectives.reduce_scatter(torch.tensor([1.0, 2.0]), part)
    assert part.tolist() == [1.0, 2.0]
