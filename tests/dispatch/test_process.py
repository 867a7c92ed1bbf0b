"""Claims about a run in a process of its own: however it ends, there is a record that says how, and nothing is left.

Every fault is real: signals, limits, a parent that dies. Progress messages are the events that tests wait for.
"""

from __future__ import annotations

import dataclasses
import fcntl
import os
import select
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from llmsys import compose, job
from llmsys.dispatch import child, ending, process
from llmsys.job import Job, Record

LONG = ("train.steps=100000", "train.global_batch=2", "train.micro_batch=2", "train.length=32", "train.threads=1")
"""A run that does not end by itself within a test."""


def make(results: Path, *overrides: str) -> Job:
    made = job.make(compose.compose([f"results={results}", *overrides]))
    Path(made.out).mkdir(parents=True, exist_ok=True)
    return made


def run(made: Job, at_step: Callable[[int], None] = lambda pid: None, step: int = 2) -> Record:
    """Runs `made`; when it reports `step`, calls `at_step` with the worker's process id, once."""
    called = []

    def progress(values: dict[str, Any]) -> None:
        if values.get("step", 0) >= step and not called:
            called.append(True)
            at_step(worker())

    lock = os.open(Path(made.out) / ".lock", os.O_RDWR | os.O_CREAT)
    try:
        return process.run(made, progress, lock)
    finally:
        os.close(lock)


def worker() -> int:
    """The one child of this test that runs a job."""
    children = child.descendants(os.getpid())
    return next(pid for pid in children if b"llmsys.dispatch.worker" in Path(f"/proc/{pid}/cmdline").read_bytes())


def gone(pid: int, within_s: float = 10.0) -> bool:
    """Waits for the end of a process that need not be our child."""
    try:
        handle = os.pidfd_open(pid)
    except ProcessLookupError:
        return True
    try:
        return bool(select.select([handle], [], [], within_s)[0])
    finally:
        os.close(handle)


def test_a_killed_worker_is_crashed_and_its_metrics_stay(results: Path) -> None:
    made = make(results, *LONG)
    record = run(made, lambda pid: os.kill(pid, signal.SIGKILL))
    assert (record.status, record.reason, record.error) == ("crashed", "signal", "killed by SIGKILL")
    assert Record.read(Path(made.out)) == record
    assert (Path(made.out) / "metrics.jsonl").read_text().count("\n") >= 1


@pytest.mark.slow
def test_a_stopped_worker_is_a_hang_and_is_killed(results: Path) -> None:
    made = make(results, *LONG, "dispatch.heartbeat_s=8")
    pids: list[int] = []

    def stop(pid: int) -> None:
        pids.append(pid)
        os.kill(pid, signal.SIGSTOP)

    record = run(made, stop)
    assert (record.status, record.reason) == ("hang", "no heartbeat")
    assert gone(pids[0])


def test_a_worker_past_its_deadline_is_a_timeout(results: Path) -> None:
    record = run(make(results, *LONG, "dispatch.timeout_s=6"))
    assert (record.status, record.reason) == ("timeout", "deadline")
    assert record.seconds < 30


def test_alive_but_without_progress_is_a_hang(results: Path) -> None:
    """Every step takes longer than `stall_s`: the process lives and says so, and is given up after its first."""
    slow = (
        "train.steps=300",
        "model.hidden_size=256",
        "model.intermediate_size=1024",
        "train.length=512",
        "train.micro_batch=8",
    )
    made = make(results, *LONG, *slow, "train.global_batch=8", "dispatch.stall_s=0.05", "profile.probe=false")
    began: list[int] = []
    record = run(made, began.append, step=1)
    assert (record.status, record.reason) == ("hang", "no progress")
    assert began, "a step was done before: what came before the first does not count"


def test_out_of_memory_under_a_limit_is_a_result(results: Path) -> None:
    record = run(make(results, "model=llama_85m", "train.steps=1", "dispatch.memory_gib=1"))
    assert (record.status, record.reason) == ("oom", "host memory"), record.error


def test_an_interrupt_reaches_the_worker_which_writes_its_own_record(results: Path) -> None:
    made = make(results, *LONG)
    before = signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell's background jobs ignore it
    try:
        with pytest.raises(KeyboardInterrupt):
            run(made, lambda pid: os.kill(os.getpid(), signal.SIGINT))
    finally:
        signal.signal(signal.SIGINT, before)
    record = Record.read(Path(made.out))
    assert record is not None
    assert (record.status, record.reason) == ("interrupted", "signal")
    assert "goes on from there" in record.error, "written by the worker, between two steps"
    assert list((Path(made.out) / "checkpoint").glob("step-*")), "the same command would resume"


def test_an_interrupt_after_the_record_is_written_does_not_replace_it(results: Path) -> None:
    """The moment between a worker's last write and its end, without a worker: the record is there, the verdict late."""
    made = make(results, *LONG)
    own = dataclasses.replace(Record.begin(made), status="ok", reason="", error="", env={"threads": 1})
    own.write(Path(made.out))
    assert ending.write(made, 1, ("interrupted", "signal", "stopped at once"), 0.0) == own
    later = ending.write(made, 2, ("crashed", "signal", "killed by SIGKILL"), 0.0)
    assert (later.status, later.attempts) == ("crashed", 2), "that record was of the attempt before"


@pytest.mark.slow
def test_a_run_again_counts_its_attempts(results: Path) -> None:
    made = make(results, *LONG)
    assert run(made, lambda pid: os.kill(pid, signal.SIGKILL)).attempts == 1
    assert run(made, lambda pid: os.kill(pid, signal.SIGKILL)).attempts == 2


def test_a_worker_dies_with_its_parent(results: Path) -> None:
    """A parent killed outright leaves no orphan at work, and the lock on the folder is free again."""
    code = (
        "import os, sys\n"
        "from tests.dispatch.test_process import make, run\n"
        "from pathlib import Path\n"
        "run(make(Path(sys.argv[1]), *sys.argv[2:]), lambda pid: print(pid, flush=True))\n"
    )
    root = Path(__file__).parents[2]
    parent = subprocess.Popen(
        [sys.executable, "-c", code, str(results), *LONG], stdout=subprocess.PIPE, text=True, cwd=root
    )
    assert parent.stdout is not None
    pid = int(parent.stdout.readline())
    parent.kill()
    parent.wait()
    parent.stdout.close()
    assert gone(pid)
    (lock,) = results.rglob(".lock")
    with open(lock) as file:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)


@pytest.mark.slow
def test_a_parent_that_was_suspended_does_not_take_the_pause_for_a_hang(results: Path) -> None:
    """After a suspension the pipe is full of signs of life: they are read before silence is judged."""
    made = make(results, "train.steps=40", "train.threads=1", "dispatch.heartbeat_s=6")
    record = run(made, lambda pid: time.sleep(8), step=1)  # the fault: for so long the parent does not listen
    assert record.status == "ok", record.error


def test_every_process_of_the_tree_is_found(tmp_path: Path) -> None:
    shell = subprocess.Popen(["sh", "-c", "sleep 60 & echo $!; wait"], stdout=subprocess.PIPE, start_new_session=True)
    assert shell.stdout is not None
    grandchild = int(shell.stdout.readline())
    try:
        assert {shell.pid, grandchild} <= set(child.descendants(os.getpid()))
    finally:
        child.kill_tree(shell)
        shell.stdout.close()
    assert gone(grandchild)


@pytest.mark.parametrize(
    ("printed", "returncode", "expected"),
    [
        ("terminate called after throwing an instance of 'std::bad_alloc'", -6, ("oom", "host memory")),
        ("Fatal Python error: Segmentation fault", -11, ("crashed", "signal")),
        ("ImportError: no such module", 1, ("crashed", "exit")),
    ],
)
def test_a_child_without_a_record_is_judged_by_how_it_ended(
    printed: str, returncode: int, expected: tuple[str, str]
) -> None:
    assert ending.of_child([printed], returncode, ending.kernel_oom_kills())[:2] == expected
