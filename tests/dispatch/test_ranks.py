"""Claims about a run of several ranks: whichever of them fails, and however, the run ends within seconds, says which
one it was, and leaves no process, no port and no network behind.
"""

from __future__ import annotations

import os
import resource
import signal
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from llmsys import compose, job
from llmsys.comm import link
from llmsys.dispatch import child, process
from llmsys.job import Job, Record

TWO = ("engine=ddp", "train.world=2", "train.global_batch=4", "train.micro_batch=2", "train.length=32")
LONG = (*TWO, "train.steps=100000", "train.threads=1")


def make(results: Path, *overrides: str) -> Job:
    made = job.make(compose.compose([f"results={results}", *overrides]))
    Path(made.out).mkdir(parents=True, exist_ok=True)
    return made


def ranks() -> list[int]:
    """The process ids of this test's ranks, rank 0 first."""
    found = child.descendants(os.getpid())
    return sorted(pid for pid in found if b"dispatch.worker" in Path(f"/proc/{pid}/cmdline").read_bytes())


class Run:
    """Runs `made`; at the first report of step `at` calls `fault` with the ranks' process ids."""

    def __init__(self, made: Job, fault: Callable[[list[int]], None] = lambda pids: None, at: int = 2) -> None:
        self.pids: list[int] = []
        self.fault_at = 0.0

        def progress(values: dict[str, Any]) -> None:
            if values.get("step", 0) >= at and not self.pids:
                self.pids = ranks()
                self.fault_at = time.monotonic()
                fault(self.pids)

        lock = os.open(Path(made.out) / ".lock", os.O_RDWR | os.O_CREAT)
        try:
            self.record: Record | None = process.run(made, progress, lock)
        except KeyboardInterrupt:
            self.record = Record.read(Path(made.out))
        finally:
            os.close(lock)
        self.seconds_after = time.monotonic() - self.fault_at

    @property
    def left(self) -> list[int]:
        """Which of the ranks still are."""
        return [pid for pid in self.pids if Path(f"/proc/{pid}").exists()]


def the_record(run: Run) -> Record:
    assert run.record is not None
    return run.record


@pytest.mark.parametrize("victim", [0, pytest.param(1, marks=pytest.mark.slow)])
def test_a_killed_rank_ends_the_run_within_seconds(results: Path, victim: int) -> None:
    run = Run(make(results, *LONG), lambda pids: os.kill(pids[victim], signal.SIGKILL))
    record = the_record(run)
    assert (record.status, record.reason, record.error) == ("crashed", "signal", f"rank {victim}: killed by SIGKILL")
    assert run.seconds_after < 15
    assert len(run.pids) == 2
    assert run.left == []


def test_the_first_ranks_error_is_shown_not_its_victims(results: Path) -> None:
    """Rank 1 runs out of memory; rank 0 then fails too, on a closed connection, which is nobody's business."""

    def starve(pids: list[int]) -> None:
        resource.prlimit(pids[1], resource.RLIMIT_DATA, (1, 1))

    run = Run(make(results, *LONG, "train.length=256", "train.micro_batch=2"), starve)
    record = the_record(run)
    assert (record.status, record.reason) == ("oom", "host memory"), record.error
    assert record.error.startswith("rank 1: ")
    assert run.left == []


@pytest.mark.slow
def test_a_stopped_rank_is_a_hang_that_names_it(results: Path) -> None:
    run = Run(make(results, *LONG, "dispatch.heartbeat_s=6"), lambda pids: os.kill(pids[1], signal.SIGSTOP))
    record = the_record(run)
    assert (record.status, record.reason) == ("hang", "no heartbeat")
    assert record.error.startswith("rank 1: ")
    assert run.left == []


def test_what_is_wrong_for_all_ranks_is_said_once(results: Path) -> None:
    """A refusal keeps its lines, as of one rank: which rank came to it first does not matter."""
    run = Run(make(results, *TWO, "hardware.mem_gib=0.001"))
    record = the_record(run)
    assert (record.status, record.reason) == ("skipped", "memory")
    assert "What would run:" in record.error
    assert not record.error.startswith("rank")


@pytest.mark.slow
def test_sigterm_leaves_a_checkpoint_of_all_ranks_and_the_run_goes_on(results: Path) -> None:
    """Sent to every process of the run, as service managers do: the ranks hear it twice, from there and the parent."""

    def everybody(pids: list[int]) -> None:
        for pid in (*pids, os.getpid()):
            os.kill(pid, signal.SIGTERM)

    steps = ("train.steps=12", "train.threads=1", *TWO, "train.global_batch=16", "train.length=128")
    made = make(results, *steps)
    before = signal.signal(signal.SIGTERM, lambda *_: (_ for _ in ()).throw(KeyboardInterrupt))
    try:
        stopped = the_record(Run(made, everybody))
    finally:
        signal.signal(signal.SIGTERM, before)
    assert (stopped.status, stopped.reason) == ("interrupted", "signal")
    assert "goes on from there" in stopped.error
    (folder,) = (Path(made.out) / "checkpoint").glob("step-*")
    assert {"rank-0.safetensors", "rank-1.safetensors"} <= {path.name for path in folder.iterdir()}
    again = the_record(Run(made))
    assert again.status == "ok", again.error
    assert again.resumed_from_step == int(folder.name.removeprefix("step-"))
    assert again.attempts == 2


@pytest.mark.slow
def test_ranks_listen_on_loopback_only_and_leave_a_log_each(results: Path) -> None:
    found: list[str] = []

    def look(pids: list[int]) -> None:
        found.extend(address for pid in pids for address in listening(pid))
        os.kill(pids[0], signal.SIGKILL)

    made = make(results, *LONG)
    Run(made, look)
    assert found, "rank 0 serves the store"
    assert all(address.startswith(("127.", "::1")) for address in found), found
    for name in ("log.txt", "log.1.txt"):
        assert "of 2, process" in (Path(made.out) / name).read_text()


def listening(pid: int) -> list[str]:
    """The addresses at which a process accepts connections."""
    links = [os.readlink(path) for path in Path(f"/proc/{pid}/fd").iterdir() if path.is_symlink()]
    sockets = {link[8:-1] for link in links if link.startswith("socket:[")}
    found = []
    for table in ("tcp", "tcp6"):
        for line in Path(f"/proc/{pid}/net/{table}").read_text().splitlines()[1:]:
            fields = line.split()
            if fields[3] == "0A" and fields[9] in sockets:
                raw = bytes.fromhex(fields[1].split(":")[0])
                if table == "tcp":
                    found.append(".".join(str(byte) for byte in raw[::-1]))
                else:
                    found.append("::1" if raw == b"\0" * 12 + b"\0\0\0\1"[::-1] else raw.hex())
    return found


@pytest.mark.slow
def test_ranks_on_a_shaped_link_take_as_long_as_it_says(results: Path) -> None:
    """2 Mbit/s, and gradients of 0.57 MB: a ring of two sends them once each way, so a step takes 2.3 s, not 20 ms."""
    if reason := link.why_not():
        pytest.skip(reason)
    slow = ("network.name=slow", "network.up_mbit=2", "network.down_mbit=2", "train.steps=3", "profile.warmup=1")
    record = the_record(Run(make(results, *TWO, *slow, "train.threads=1", "data.num_examples=16")))
    assert record.status == "ok", record.error
    assert record.env["network"] == {
        "address": "10.77.0.1",
        "interface": "eth0",
        "up_mbit": 2.0,
        "down_mbit": 2.0,
        "delay_ms": 0.0,
        "notes": "",
        "shaped": True,
        "why_not": "",
    }
    gradients = record.summary["comm_all_reduce_bytes"]
    assert gradients > 4 * record.summary["trainable_params"]
    assert record.summary["step_ms_p50"] / 1e3 == pytest.approx(gradients * 8 / 2e6, rel=0.25)
