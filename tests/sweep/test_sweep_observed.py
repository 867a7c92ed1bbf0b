"""Claims about estimates in a sweep that prunes: they order its runs and refuse none, where that harms nobody."""

from __future__ import annotations

import logging
from collections.abc import Callable
from pathlib import Path
from subprocess import CompletedProcess

import pytest
import torch
from sweep_harness import written

from llmsys import compose, schema
from llmsys.errors import Refused
from llmsys.train import checks

TINY = ("train.threads=1", "train.length=32", "data.num_examples=40", "profile.warmup=1", "profile.probe=false")
TOO_MUCH = ("hardware.mem_gib=0.001", "train.steps=3")
"""1 MiB, into which no run is predicted to fit."""


@pytest.mark.slow
def test_a_cell_that_is_predicted_not_to_fit_is_run_and_seen_to(
    llmsys: Callable[..., CompletedProcess[str]], results: Path
) -> None:
    done = llmsys("-m", *TINY, *TOO_MUCH, "sweep.prune=true", "dispatch.memory_gib=2")
    assert done.returncode == 0, done.stderr
    (record,) = written(results)
    assert (record.status, record.reason) == ("ok", "")
    assert record.summary["predicted_peak_gib"] > 0.001
    assert "run all the same, to see" in (next(results.rglob("log.txt"))).read_text()


def config(*words: str) -> schema.Config:
    return schema.build(compose.compose([*TINY, *TOO_MUCH, *words]))


@pytest.mark.parametrize("words", [("sweep.prune=true",), ("sweep.search=max",)], ids=str)
def test_a_gpu_is_tried_and_a_host_without_a_limit_is_not(
    words: tuple[str, ...], caplog: pytest.LogCaptureFixture
) -> None:
    """Out of a GPU's memory one run ends; out of a host's the kernel pages for minutes and ends what it likes."""
    with caplog.at_level(logging.WARNING):
        assert checks.check_memory(config(*words), torch.device("cuda")) > 0
    assert "hardware.mem_gib=0.001: the device has" in caplog.text
    with pytest.raises(Refused):
        checks.check_memory(config(*words), torch.device("cpu"))
    assert checks.check_memory(config(*words, "dispatch.memory_gib=0.01"), torch.device("cpu")) > 0


def test_a_limit_that_the_host_has_not_for_every_rank_protects_nobody(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(checks, "host_available", lambda: 10 * 2**30)
    words = ("sweep.prune=true", "engine=ddp", "dispatch.memory_gib=6", "train.micro_batch=4")
    assert checks.check_memory(config(*words), torch.device("cpu")) > 0
    with pytest.raises(Refused):
        checks.check_memory(config(*words, "train.world=2"), torch.device("cpu"))


@pytest.mark.parametrize("device", ["cuda", "cpu"])
def test_without_pruning_an_estimate_refuses_as_outside_a_sweep(device: str) -> None:
    with pytest.raises(Refused):
        checks.check_memory(config("dispatch.memory_gib=0.01"), torch.device(device))


def test_what_is_offloaded_must_fit_into_the_host_in_a_sweep_too(monkeypatch: pytest.MonkeyPatch) -> None:
    """That is the host's memory, whatever device there is."""
    monkeypatch.setattr(checks, "host_available", lambda: 1000)
    offloading = config("sweep.prune=true", "engine=zero2_offload", "train.world=2", "train.micro_batch=4")
    with pytest.raises(Refused, match="offloads"):
        checks.check_memory(offloading, torch.device("cuda"))


@pytest.mark.parametrize("suite", [name for name in compose.choices("sweep") if name.startswith("bench_")])
def test_the_suites_go_by_what_they_see(suite: str) -> None:
    made = schema.build(compose.compose([f"sweep={suite}"]))
    assert made.sweep.observes
    assert not made.force, "which would also let a laptop page, and a run take hours"
