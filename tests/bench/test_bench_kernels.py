"""Claims about the kernels that benchmarks time: on a GPU those that a run would use for speed, and the same ones
wherever something is timed beside a run; on a CPU they change no bit.
"""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
import train_harness as harness

from llmsys import compose, job, runner, schema
from llmsys.bench.ops.clock import Clock

EXPERIMENTS = [name for name in compose.choices("exp") if name.startswith("bench_")]
SUITES = [name for name in compose.choices("sweep") if name.startswith("bench_")]


@pytest.mark.parametrize("word", [*(f"+exp={name}" for name in EXPERIMENTS), *(f"sweep={name}" for name in SUITES)])
def test_every_benchmark_that_runs_something_may_use_any_kernel(word: str) -> None:
    """Deterministic ones are slower on a GPU, and fused attention's need more memory. A suite has it of its experiment;
    what only predicts runs nothing."""
    config = schema.build(compose.compose([word]))
    if not isinstance(config.task, schema.Predicting):
        assert not config.train.deterministic


@pytest.mark.parametrize("kind", ["full", "lora_peft"])
def test_on_a_cpu_both_settings_have_the_same_bits(kind: str, tmp_path: Path) -> None:
    """So what is promised of equal losses holds in benchmarks too."""
    curves = []
    for deterministic in (True, False):
        out = tmp_path / str(deterministic)
        harness.run(out, harness.config(kind, train__steps=3, train__deterministic=deterministic))
        curves.append(harness.curve(out))
    assert curves[0] == curves[1]


@pytest.mark.parametrize("deterministic", [True, False])
def test_operators_are_timed_under_the_setting_of_the_run(
    deterministic: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: set[bool] = set()

    def samples(clock: Clock, acts: object) -> list[float]:
        seen.add(torch.are_deterministic_algorithms_enabled())
        return [1.0] * 3

    monkeypatch.setattr(Clock, "samples", samples)
    words = ["+exp=bench_ops", "model=llama_tiny", "train.length=32", "train.micro_batch=1", "train.threads=1"]
    words += ["task.operators=[gemm,softmax]", f"train.deterministic={deterministic}", "hardware.tflops=1"]
    record = runner.run(job.make(compose.compose([*words, f"results={tmp_path}", "dispatch=inline"])))
    assert record.status == "ok", record.error
    assert seen == {deterministic}
    assert not torch.are_deterministic_algorithms_enabled()
