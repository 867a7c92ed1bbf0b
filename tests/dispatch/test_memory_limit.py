"""Claims about `dispatch.memory_gib`: it limits a rank on a CPU, and on a GPU it is not set, which the record says."""

from __future__ import annotations

import copy
import io
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

from llmsys import compose, dispatch, job, main
from llmsys.dispatch import memory_limit
from llmsys.dispatch.show import Show
from llmsys.job import Job
from llmsys.sweep import predict
from llmsys.sweep.course import Course


def config(results: Path, device: str, *words: str) -> dict[str, Any]:
    made = copy.deepcopy(job.make(compose.compose([f"results={results}", *words])).config)
    made["hardware"]["device"] = device
    return made


def test_on_a_gpu_the_limit_is_not_set_and_the_record_says_so(results: Path) -> None:
    """Under 10 MiB no worker lives: this one gets as far as to find that there is no GPU here, or runs on it."""
    made = config(results, "cuda", "dispatch.memory_gib=0.01", "train.steps=2", "data.num_examples=40")
    run = Job(config=made, run_id="x", out=str(results / "x"))
    (record,) = dispatch.submit([run], Show(Console(file=io.StringIO())))
    assert (record.status, record.reason) in (("failed", "ValueError"), ("ok", "")), record.error
    assert "not set" in record.notes["dispatch.memory_gib"]


def test_on_a_cpu_it_is_set(results: Path) -> None:
    made = config(results, "cpu", "dispatch.memory_gib=0.5")
    assert memory_limit.gib(made) == 0.5
    assert memory_limit.ignored(made) == ""
    assert memory_limit.ignored(config(results, "cuda")) == "", "where none was asked for there is nothing to say"


def test_a_search_on_a_gpu_begins_at_what_the_gpu_has_room_for(results: Path) -> None:
    """0.9 GiB is what the suite limits a CPU's ranks to."""
    suite = ("sweep=bench_pretrain_maxbatch",)
    assert predict.room_bytes(config(results, "cuda", *suite), 79.0) == 79 * 2**30
    assert predict.room_bytes(config(results, "cpu", *suite), 79.0) == pytest.approx(0.45 * 2**30)


def test_a_sweep_says_once_that_it_sets_no_limit(results: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    seen = io.StringIO()
    words = ("dispatch.memory_gib=0.5", "train.threads=1", f"results={results}")
    wanted = [compose.compose([*words, f"train.seed={seed}"]) for seed in (0, 1)]
    made = Course(wanted, main.make_job, Show(Console(file=seen, width=200)))
    monkeypatch.setitem(dispatch._PLACES, "process", lambda job, progress, lock, stop: ran(job))
    for each in made.cells:
        each.job.config["hardware"]["device"] = "cuda"
    list(made.run())
    assert seen.getvalue().count("not set: it limits the host's memory") == 1


def ran(made: Job) -> job.Record:
    record = job.Record.begin(made)
    record.status = "ok"
    return record
