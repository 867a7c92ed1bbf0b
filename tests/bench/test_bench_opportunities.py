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
from llmsys.bench.opportunities import changes
from llmsys.bench.opportunities.least import Bytes, bytes_by_row
from llmsys.bench.opportunities.ranking import ranking
from llmsys.bench.ops.clock import Clock
from llmsys.cost.case import Case
from llmsys.job import Record

TINY = ["+exp=bench_opportunities", "train.length=32", "train.global_batch=4", "train.micro_batch=2"]
TINY += ["data.num_examples=24", "task.warmup=1", "task.rounds=2", "model=llama_tiny", "train.threads=1"]
CLOCK = Clock(device=torch.device("cpu"), spread=0.9, least_s=0.0, most_s=0.002)


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
    (slow, *_) = ranking(summary, {"norm": Bytes(1e9)}, flops_per_s=1e12, bytes_per_s=1e9)
    assert slow.row == "down"
    faster = next(each for each in ranking(summary, {"norm": Bytes(1e9)}, flops_per_s=1e12, bytes_per_s=1e9))
    assert faster.headroom_percent >= 0, "a row that is faster than its roofline has none"


def test_the_least_bytes_are_of_every_operand_once() -> None:
    """By hand, for two blocks of width 64 in fp32, two micro-batches of 2 x 32 tokens."""
    found = bytes_by_row(case())
    hidden, square = 4 * 64 * 64, 4 * 2 * 4 * 32 * 32
    assert found["norm"] == Bytes(2 * 5 * 2 * hidden, 2 * 5 * 3 * hidden)
    assert found["softmax"] == Bytes(2 * 2 * 2 * square, 2 * 2 * 3 * square)
    down = 4 * (64 * (176 + 64) + 176 * 64)
    assert found["down"] == Bytes(2 * 2 * down, 2 * 2 * 2 * down)
    assert "attention" not in found
    assert found["optimizer"].forward == 7 * 4 * sum(p.numel() for p in built().parameters())


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
        gone, comes = change.saves_ms(config, {f"modules/{row}/ms": 1.0 for row in change.rows}, CLOCK)
        assert gone == len(change.rows)
        assert comes > 0
        left = {each.name for each in changes.known(change.configured(config))}
        assert (change.name in left) == (change.patch is not None)


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
    summary = {"modules/down/ms": 1.0, "modules/down/forward_flops": 1e6, "peak_tflops": 1.0}
    env = {"device": "cuda", "device_name": "NVIDIA H100 80GB HBM3"}
    told = {}
    for name, changed in (("known", env), ("unknown", {**env, "device_name": "Some Card"})):
        (tmp_path / name).mkdir()
        known = {"status": "ok", "config": config, "summary": summary, "env": changed}
        Record(name="n", run_id="r", task="bench_modules", **known).write(tmp_path / name)  # type: ignore[arg-type]
        words = [*TINY, f"task.modules={tmp_path / name}", f"results={tmp_path / 'results'}", "dispatch=inline"]
        told[name] = runner.run(job.make(compose.compose(words)))
    assert told["known"].summary["memory_gb_per_s"] == 3350
    assert "hardware.mem_gbps: missing; of Some Card the memory's GB/s are not listed" in told["unknown"].error
    with pytest.raises(ValueError, match=r"task\.modules=nowhere: no record\.json there"):
        job.make(compose.compose([*TINY, "task.modules=nowhere"]))
