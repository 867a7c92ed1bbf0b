"""Claims about two processes at one cell: what either has finished, the other never replaces.

What has to be pruned is decided under the run's lock, for whoever waits for it may find the run made meanwhile.
"""

from __future__ import annotations

import contextlib
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from sweep_harness import Machine, configs, course, ended, nowhere, written

from llmsys import dispatch
from llmsys.dispatch.show import Show
from llmsys.dispatch.stop import Stop
from llmsys.job import Job

OTHER = """
import fcntl, pathlib, sys
out = pathlib.Path(sys.argv[1])
with open(out / ".lock", "w") as lock:
    fcntl.flock(lock, fcntl.LOCK_EX)
    print("held", flush=True)
    text = sys.stdin.read()
    (out / "record.json").write_text(text)
"""
"""Holds a run's lock until it is told the record that it has made; then writes that and ends."""


def test_a_run_that_another_process_finishes_before_its_lock_is_had_is_not_pruned(
    results: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    machine = Machine(monkeypatch, lambda config: ("oom", "host memory"))
    list(course(configs(results, "sweep.prune=true", train__micro_batch=[4])).run())
    locked = dispatch.locked

    @contextlib.contextmanager
    def late(job: Job, show: Show, stop: Stop | None = None) -> Iterator[int]:
        with locked(job, show) as lock:
            ended(job, "ok", "").write(Path(job.out))
            yield lock

    monkeypatch.setattr(dispatch, "locked", late)
    found = [(record.status, record.reason) for _, record in course(_larger(results)).run()]
    assert found == [("ok", "")]
    assert sorted(record.status for record in written(results)) == ["ok", "oom"], "and its record is as it was left"
    assert len(machine.made) == 1


def test_the_same_of_two_processes(results: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The other one holds the lock until this one says that it waits for it."""
    Machine(monkeypatch, lambda config: ("oom", "host memory"))
    list(course(configs(results, "sweep.prune=true", train__micro_batch=[4])).run())
    command = [sys.executable, "-c", OTHER, course(_larger(results)).cells[0].job.out]
    Path(command[-1]).mkdir()
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as other:

        class Waits(Show):
            def waiting(self, job: Job) -> None:
                assert other.stdin is not None
                other.stdin.write(ended(job, "ok", "").to_json())
                other.stdin.close()

        assert other.stdout is not None
        assert other.stdout.readline() == "held\n"
        found = [(record.status, record.reason) for _, record in course(_larger(results), Waits(nowhere())).run()]
    assert found == [("ok", "")]
    assert sorted(record.status for record in written(results)) == ["ok", "oom"]


def test_what_cannot_be_here_leaves_what_could_be_elsewhere(results: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """On a machine with fewer GPUs, say, that shares its results with a larger one of the same name and code."""
    Machine(monkeypatch)
    combinations = configs(results, "method=lorafa", train__length=[32, 100000])
    made = course(combinations)
    (impossible,) = (each for each in made.cells if each.fault)
    Path(impossible.job.out).mkdir(parents=True)
    ended(impossible.job, "ok", "").write(Path(impossible.job.out))
    assert {record.status for _, record in made.run()} == {"ok"}
    assert {record.status for record in written(results)} == {"ok"}


def _larger(results: Path) -> list[dict[str, object]]:
    return configs(results, "sweep.prune=true", train__micro_batch=[8])
