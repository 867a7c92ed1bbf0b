"""Runs a job in a fresh process group: nothing leaks from one run into the next, and nothing survives it.

The child speaks over a pipe, one JSON object a line: signs of life and progress. The parent blocks on that pipe until
the next deadline, and kills the whole tree when one passes. A run's record lies in its folder from its first moment,
as unfinished; when the child has ended and it still is, the parent writes into it how the child ended.
"""

from __future__ import annotations

import contextlib
import dataclasses
import io
import json
import os
import select
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from llmsys import job as jobs
from llmsys.job import Job, Record
from llmsys.profile import environment

GRACE_S = 20.0
"""How long an interrupted child may take to write its record before it is killed."""


_FOR_THE_CPU = {
    "MALLOC_MMAP_THRESHOLD_": str(2**32),
    "MALLOC_TRIM_THRESHOLD_": str(2**34),
    "OMP_WAIT_POLICY": "PASSIVE",
}
"""glibc gives a large tensor back to the kernel when it is freed, and gets the next one page by page, zeroed: a step of
MiniLM on two cores took 0.75 s so and 0.61 s with the first two. A thread that waits for the others spins, which beside
one other busy process took 4.6 s a step, and 1.2 s with the third. What the user has set wins; the record has all."""


def run(job: Job, progress: Callable[[dict[str, Any]], None], lock: int) -> Record:
    """The job's record, always: the child's own, or one that says how the child ended.

    `lock` is a file descriptor that the child inherits and keeps open as long as it lives. KeyboardInterrupt is passed
    on after the child has ended; its record is then on disk.
    """
    attempt = jobs.previous_attempts(Path(job.out)) + 1
    start = time.monotonic()
    kills_before = _kernel_oom_kills()
    log = Path(job.out) / "log.txt"
    log_start = log.stat().st_size if log.exists() else 0
    child, pipe = _start(job, log, lock)
    try:
        with pipe:
            verdict = _follow(job, child, pipe, progress, start)
    finally:
        _kill_tree(child)
    verdict = verdict or _verdict(child.returncode, kills_before, log, log_start)
    record = write_ending(job, attempt, *verdict, seconds=time.monotonic() - start)
    if verdict[0] == "interrupted":
        raise KeyboardInterrupt  # also where the child had just finished: the person wants no next run
    return record


def _start(job: Job, log: Path, lock: int) -> tuple[subprocess.Popen[bytes], io.FileIO]:
    """The child in a session of its own, and the pipe that it speaks over."""
    reader, writer = os.pipe()
    with open(log, "ab") as output:
        try:
            child = subprocess.Popen(
                [sys.executable, "-m", "llmsys.dispatch.worker", str(writer), str(os.getpid())],
                stdin=subprocess.PIPE,
                stdout=output,
                stderr=output,
                env={**_FOR_THE_CPU, **os.environ, "OMP_NUM_THREADS": str(job.config["train"]["threads"])},
                pass_fds=(writer, lock),
                start_new_session=True,
            )
        finally:
            os.close(writer)
    return child, io.FileIO(reader)


Verdict = tuple[str, str, str]
"""(status, reason, error)"""


def _follow(
    job: Job, child: subprocess.Popen[bytes], pipe: io.FileIO, progress: Callable[[dict[str, Any]], None], start: float
) -> Verdict | None:
    """Listens until the child is done or a deadline passes; None if the child closed the pipe by itself."""
    settings = job.config["dispatch"]
    deadline = start + settings["timeout_s"]
    heard, idle_s, rest, interrupted = time.monotonic(), 0.0, b"", False
    assert child.stdin is not None
    with contextlib.suppress(BrokenPipeError):  # it died at once; its log says why
        child.stdin.write(json.dumps(dataclasses.asdict(job)).encode())
        child.stdin.close()
    while True:
        try:
            now = time.monotonic()
            wait = max(min(deadline, heard + settings["heartbeat_s"]) - now, 0)
            if not select.select([pipe], [], [], wait)[0]:
                # Judged only now that nothing is there to read: after a suspension the pipe is full, not silent.
                silent = time.monotonic() - heard
                if silent >= settings["heartbeat_s"]:
                    return "hang", "no heartbeat", f"no sign of life for {silent:.1f} s (dispatch.heartbeat_s)"
            if time.monotonic() >= deadline:
                if interrupted:
                    return "interrupted", "signal", f"stopped; it did not end by itself within {GRACE_S:g} s"
                return "timeout", "deadline", f"not done after dispatch.timeout_s={settings['timeout_s']:g} s"
            if idle_s >= settings["stall_s"]:
                return "hang", "no progress", f"alive, but no step done for {idle_s:.0f} s (dispatch.stall_s)"
            if not select.select([pipe], [], [], 0)[0]:
                continue
            chunk = pipe.read(65536)
            if not chunk:
                child.wait()
                return ("interrupted", "signal", "stopped") if interrupted else None
            heard = time.monotonic()
            *lines, rest = (rest + chunk).split(b"\n")
            for line in lines:
                message = json.loads(line)
                idle_s = message.get("idle_s", 0.0)
                if "progress" in message:
                    progress(message["progress"])
        except KeyboardInterrupt:
            if interrupted:
                raise
            interrupted = True
            with contextlib.suppress(ProcessLookupError):
                os.killpg(child.pid, signal.SIGINT)
            deadline = min(deadline, time.monotonic() + GRACE_S)


def _verdict(returncode: int, kills_before: int, log: Path, log_start: int) -> Verdict:
    """How a child that left no record ended, from its exit code, the kernel's counter and what it printed last."""
    with open(log, "rb") as file:
        file.seek(log_start)
        printed = [line.strip() for line in file.read().decode(errors="replace").splitlines() if line.strip()]
    last = printed[-1] if printed else ""
    if any("bad_alloc" in line or "MemoryError" in line for line in printed[-20:]):
        return "oom", "host memory", last
    if returncode == -signal.SIGKILL and _kernel_oom_kills() > kills_before:
        return "oom", "host memory", "killed by the kernel, which was out of memory"
    if returncode < 0:
        return "crashed", "signal", f"killed by {signal.Signals(-returncode).name}"
    return "crashed", "exit", f"exit code {returncode} without a record; last line: {last}"


def write_ending(job: Job, attempt: int, status: str, reason: str, error: str, seconds: float) -> Record:
    """The record of a child that has ended: its own if it wrote one for this attempt, else one with this verdict."""
    out = Path(job.out)
    (out / ".reserve").unlink(missing_ok=True)
    found = Record.read(out)
    begun = found is not None and found.attempts == attempt
    if found is not None and begun and found.reason != jobs.UNFINISHED:
        return found
    record = dataclasses.replace(
        found if found is not None and begun else Record.begin(job),
        status=status,
        reason=reason,
        error=error,
        seconds=round(seconds, 3),
    )
    record.env = record.env or environment.describe(job.config["hardware"]["device"], job.config["train"]["threads"])
    record.write(out)
    return record


def _kernel_oom_kills() -> int:
    """How many processes the kernel has killed for memory, as far as it tells."""
    for path, key in (("/sys/fs/cgroup/memory.events", "oom_kill"), ("/proc/vmstat", "oom_kill")):
        if Path(path).exists():
            for line in Path(path).read_text().splitlines():
                if line.split()[0] == key:
                    return int(line.split()[1])
    return 0


def _kill_tree(child: subprocess.Popen[bytes]) -> None:
    """Ends the child, its process group, and, while it lives, descendants that made groups of their own."""
    descendants = _descendants(child.pid)
    for kill, target in ((os.killpg, child.pid), *((os.kill, pid) for pid in descendants)):
        try:
            kill(target, signal.SIGKILL)
        except (ProcessLookupError, PermissionError):
            continue  # gone already
    child.wait()


def _descendants(root: int) -> list[int]:
    """Process ids below `root`, from /proc; empty where there is none (the process group is killed anyway)."""
    children: dict[int, list[int]] = {}
    for stat in Path("/proc").glob("[0-9]*/stat"):
        try:
            fields = stat.read_text().rpartition(")")[2].split()
        except OSError:
            continue  # ended meanwhile
        children.setdefault(int(fields[1]), []).append(int(stat.parent.name))
    found, frontier = [], [root]
    while frontier:
        frontier = [pid for parent in frontier for pid in children.get(parent, [])]
        found += frontier
    return found
