"""Claims about opportunities: a roofline is what the work takes at the peaks, headroom is what lies above it, a change
computes what was computed before, and a record says as much as the run that left it.
"""

from __future__ import annotations

import dataclasses
import statistics
from pathlib import Path

import pytest
import torch

from llmsys import compose, job, runner, schema
from llmsys.bench.modules import tables as modules
from llmsys.bench.opportunities import changes, tables
from llmsys.bench.opportunities.least import Bytes, bytes_by_row
from llmsys.bench.opportunities.ranking import ranking
from llmsys.bench.opportunities.task import said
from llmsys.bench.ops import clock
from llmsys.bench.ops.clock import Clock
from llmsys.cost.case import Case
from llmsys.job import Record

TINY = ["+exp=bench_opportunities", "train.length=32", "train.global_batch=4", "train.micro_batch=2"]
TINY += ["data.num_examples=24", "task.warmup=1", "task.rounds=2", "model=llama_tiny", "train.threads=1"]
CLOCK = Clock(device=torch.device("cpu"), spread=0.9, least_s=0.0, most_s=0.002)


@pytest.fixture(autouse=True)
def _little_is_cold(monkeypatch: pytest.MonkeyPatch) -> None:
    """So that operands are made in no time."""
    monkeypatch.setattr(clock, "COLD_BYTES", 2**20)


def case(**model: object) -> Case:
    shape = schema.Transformer(**{"attention": "eager", **model})  # type: ignore[arg-type]
    train = schema.Train(global_batch=4, micro_batch=2, length=32)
    return Case(shape, train, schema.Method(), schema.Engine())


def test_a_row_is_bound_by_its_arithmetic_or_by_its_bytes_and_the_rest_is_headroom() -> None:
    """By hand, at 1 TFLOP/s and 1 GB/s: `down` 2 + 4 ms of arithmetic, `norm` 1 + 3 ms of bytes."""
    summary = {"modules/down/ms": 10.0, "modules/down/forward_flops": 2e9, "modules/down/backward_flops": 4e9}
    summary |= {"modules/norm/ms": 20.0, "modules/data/ms": 6.0, "modules/unattributed/ms": 4.0}
    least = {"down": Bytes(1e6, 1e6), "norm": Bytes(1e6, 3e6)}
    found = ranking(summary, least, flops_per_s=1e12, bytes_per_s=1e9)
    assert [(each.row, each.bound_ms, each.by) for each in found] == [
        ("norm", pytest.approx(4), "memory"),
        ("down", pytest.approx(6), "compute"),
        ("data", None, ""),
        ("unattributed", None, ""),
    ]
    assert [each.headroom_percent for each in found] == pytest.approx([40, 10, 0, 0])
    found = ranking(summary, {"norm": Bytes(1e9)}, flops_per_s=1e12, bytes_per_s=1e9)
    assert [(each.row, each.headroom_percent) for each in found[:2]] == [("down", pytest.approx(10)), ("norm", 0)]
    assert found[1].bound_ms == pytest.approx(1000), "a row that is faster than its roofline has no headroom, nor less"


def test_the_least_bytes_are_of_every_operand_once() -> None:
    """By hand, for two blocks of width 64 in fp32, two micro-batches of 2 x 32 tokens."""
    found = bytes_by_row(case())
    hidden, square = 4 * 64 * 64, 4 * 2 * 4 * 32 * 32
    assert found["norm"] == Bytes(2 * 5 * 2 * hidden, 2 * 5 * 3 * hidden)
    assert found["softmax"] == Bytes(2 * 2 * 2 * square, 2 * 2 * 3 * square)
    down = 4 * (64 * (176 + 64) + 176 * 64)
    assert found["down"] == Bytes(2 * 2 * down, 2 * 2 * 2 * down)
    assert "attention" not in found
    sizes = [p.numel() for p in built().parameters()]
    assert found["optimizer"].forward == 7 * 4 * sum(sizes) + 2 * 4 * len(sizes), "with a count of steps for each"


def test_no_optimizer_can_move_less_than_its_least() -> None:
    """In 8 bits, against what bitsandbytes' AdamW really holds after a step; that state is read and written, and so are
    weights, whose gradients are read. In bf16 the moments are bf16."""
    from llmsys import models
    from llmsys.train.adamw_8bit import AdamW8bit

    train = dataclasses.replace(case().train, optimizer="adamw_8bit")
    shape = case().model
    model = models.load(shape, objective="causal_lm", num_labels=0, device=CLOCK.device, seed=0, folder=None)
    eight = AdamW8bit(model.parameters(), lr=1e-3)
    for p in model.parameters():
        p.grad = torch.ones_like(p)
    eight.step()
    state = {
        value.data_ptr(): value.numel() * value.element_size()
        for values in eight.state.values()
        for value in values.values()
        if isinstance(value, torch.Tensor)
    }
    least = bytes_by_row(dataclasses.replace(case(), train=train))["optimizer"].forward
    numel = sum(p.numel() for p in model.parameters())
    most = 12 * numel + 2 * sum(state.values())
    assert 0.99 * most < least <= most
    assert least < 0.7 * bytes_by_row(case())["optimizer"].forward
    half = bytes_by_row(case(dtype="bf16"))["optimizer"].forward
    assert half == pytest.approx(7 * 2 * numel, rel=1e-3)


def built() -> torch.nn.Module:
    from llmsys import models

    made: torch.nn.Module = models.skeleton(case().model)
    return made


def test_what_is_frozen_fused_or_computed_again_has_other_bytes() -> None:
    plain, fused = bytes_by_row(case()), bytes_by_row(case(attention="sdpa"))
    assert {"scores", "softmax", "context"} <= plain.keys()
    assert "attention" in fused
    frozen = dataclasses.replace(case(), method=schema.Adapter(kind="lora_peft"))
    assert bytes_by_row(frozen)["down"].backward == plain["down"].backward / 2
    again = dataclasses.replace(case(), train=dataclasses.replace(case().train, recompute="block"))
    for row, each in bytes_by_row(again).items():
        inside = row not in ("embedding", "logits", "loss", "optimizer")
        assert each.recompute == (each.forward if inside else 0), row
    assert bytes_by_row(case(family="t5")).keys() >= {"qkv", "output", "optimizer"}


def test_a_replacement_computes_what_it_replaces() -> None:
    from transformers.models.llama.modeling_llama import LlamaRMSNorm

    norm = LlamaRMSNorm(16, 1e-5)
    torch.nn.init.uniform_(norm.weight)
    x = torch.randn(3, 16, generator=torch.Generator().manual_seed(0))
    want = norm(x)
    changes._patch_norms(norm)
    torch.testing.assert_close(norm(x), want)


def test_each_change_that_is_known_is_timed_alone_and_made() -> None:
    config = schema.build(compose.compose(TINY))
    found = {change.name: change for change in changes.known(config)}
    assert set(found) == {"flash", "chunked_loss", "fused_norm"}
    for change in found.values():
        assert change.replacement(config, CLOCK).once_ms(CLOCK) > 0
        left = {each.name for each in changes.known(change.configured(config))}
        assert (change.name in left) == (change.patch is not None)


def test_what_is_said_of_a_change_that_was_made_and_of_one_that_was_not() -> None:
    """By hand, medians: 30 go and 10 come, so 20 ms of a step of 100 are predicted, where 25 were saved. Of a saving
    that is next to nothing no ratio is taken."""
    took = {"gone": [30.0, 31.0, 29.0], "comes": [10.0, 9.0, 11.0]}
    plain = {"gone_ms": 30.0, "comes_ms": 10.0, "saves_ms": 20.0, "saves_percent": 20.0}
    assert said(took, 100.0) == plain
    made = said({**took, "without_step": [100.0, 100.0, 110.0], "with_step": [75.0, 80.0, 85.0]}, 100.0)
    assert made == {**plain, "saved_ms": 25.0, "saved_percent": 25.0, "off_percent": pytest.approx(-20)}
    for after in ([100.0, 100.0, 110.0], [98.0, 98.0, 108.0]):
        small = said({**took, "without_step": [100.0, 100.0, 110.0], "with_step": after}, 100.0)
        assert "off_percent" not in small, "0 and 2 % of a step"
    found = ranking({"modules/data/ms": 1.0}, {}, flops_per_s=1.0, bytes_per_s=1.0)
    text = tables.markdown(found, {f"changes/flash/{key}": value for key, value in small.items()}, "a model", [])
    assert "too small to tell" in text


def test_a_saving_is_predicted_from_the_same_turns_whether_it_is_made_or_not(tmp_path: Path) -> None:
    """So the bar of `benchmarks/bench_opportunities.py` is of the number that a user gets: with `task.verify=false`
    each round has a step with clocks of its modules and each replacement, under the run's own kernels."""
    made = job.make(compose.compose([*TINY, f"results={tmp_path}", "dispatch=inline"]))
    record = runner.run(made)
    assert record.status == "ok", record.error
    for name in ("flash", "chunked_loss", "fused_norm"):
        own = {key.split("/")[2]: value for key, value in record.summary.items() if key.startswith(f"changes/{name}/")}
        assert own.keys() == {"gone_ms", "comes_ms", "saves_ms", "saves_percent"}
        for side in ("gone", "comes"):
            values = record.samples[f"changes/{name}/{side}_ms"]
            assert len(values) == 4
            assert own[f"{side}_ms"] == statistics.median(values) > 0
    assert record.notes["memory_gb_per_s"].startswith("measured")
    assert record.notes["peak_tflops"].startswith("measured")


def test_a_run_here_and_its_record_elsewhere(tmp_path: Path) -> None:
    """Measured on the spot with every change made; then told of again from that record, without a step."""
    made = job.make(compose.compose([*TINY, "task.verify=true", f"results={tmp_path}", "dispatch=inline"]))
    record = runner.run(made)
    assert record.status == "ok", record.error
    summary = record.summary
    shares = [value for key, value in summary.items() if key.startswith("opportunities/") and "headroom" in key]
    assert sum(shares) == pytest.approx(summary["headroom_percent"])
    assert 0 < summary["headroom_percent"] <= summary["roofline_known_percent"] <= 100
    for name in ("flash", "chunked_loss", "fused_norm"):
        own = {key.split("/")[2]: value for key, value in summary.items() if key.startswith(f"changes/{name}/")}
        assert own["saves_ms"] == pytest.approx(own["gone_ms"] - own["comes_ms"])
        assert ("off_percent" in own) == (abs(own["saved_percent"]) >= tables.LEAST)
        sides = ("without_step", "with_step", "gone", "comes")
        samples = [record.samples[f"changes/{name}/{side}_ms"] for side in sides]
        assert [len(each) for each in samples] == [4] * 4
        assert all(value > 0 for each in samples for value in each)
        assert own["gone_ms"] < statistics.median(samples[0]), "a part of the step"
    text = (Path(made.out) / record.files["tables"]).read_text()
    for row in modules.rows(summary):
        assert f"| {row} |" in text
    again = job.make(compose.compose([*TINY, f"task.modules={made.out}", f"results={tmp_path}", "dispatch=inline"]))
    assert again.run_id != made.run_id
    told = runner.run(again)
    assert told.status == "ok", told.error
    assert told.summary["headroom_percent"] == pytest.approx(summary["headroom_percent"])


def test_of_an_unknown_machine_s_record_the_memory_s_speed_is_asked_for(tmp_path: Path) -> None:
    config = compose.compose(["+exp=bench_modules", *TINY[1:]])
    summary = {"modules/down/ms": 1.0, "modules/down/forward_flops": 1e6, "peak_tflops": 1.0, "peak_measured": 1}
    env = {"device": "cuda", "device_name": "NVIDIA H100 80GB HBM3", "device_memory_gib": 79.2}
    told = {}
    other = {**env, "device_memory_gib": 9.9}
    for name, changed in (("known", env), ("slice", other), ("unknown", {**env, "device_name": "Some Card"})):
        (tmp_path / name).mkdir()
        known = {"status": "ok", "config": config, "summary": summary, "env": changed}
        Record(name="n", run_id="r", task="bench_modules", **known).write(tmp_path / name)  # type: ignore[arg-type]
        words = [*TINY, f"task.modules={tmp_path / name}", f"results={tmp_path / 'results'}", "dispatch=inline"]
        told[name] = runner.run(job.make(compose.compose(words)))
    assert told["known"].summary["memory_gb_per_s"] == 3350
    assert told["known"].summary["peak_tflops"] == pytest.approx(67), "not a product that was measured there"
    assert told["known"].notes["peak_tflops"].startswith("H100 SXM 80 GB in fp32")
    assert "hardware.mem_gbps: missing; of NVIDIA H100 80GB HBM3" in told["slice"].error, "a slice has less memory"
    assert "hardware.mem_gbps: missing; of Some Card the memory's GB/s are not listed" in told["unknown"].error
    with pytest.raises(ValueError, match=r"task\.modules=nowhere: no record\.json there"):
        job.make(compose.compose([*TINY, "task.modules=nowhere"]))
