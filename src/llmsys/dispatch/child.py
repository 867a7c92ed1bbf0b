"""One rank of a run as its parent sees it: a process in a session of its own, a pipe it speaks over, a log.

Both sides speak in lines of JSON. The child says `idle_s` (a sign of life), `progress`, `isolated`, `store` (where rank
0 serves) and `ended` (how its part of the run ended); the parent says the job, and answers what the child waits for.
"""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

from llmsys.comm.place import log_name
from llmsys.dispatch import ending
from llmsys.dispatch.ending import Verdict
from llmsys.dispatch.lines import Lines
from llmsys.job import Job

FOR_THE_CPU = {
    "MALLOC_MMAP_THRESHOLD_": str(2**32),
    "MALLOC_TRIM_THRESHOLD_": str(2**34),
    "OMP_WAIT_POLICY": "PASSIVE",
}
"""glibc gives a large tensor back to the kernel when it is freed, and gets the next one page by page, zeroed: a step of
MiniLM on two cores took 0.75 s so and 0.61 s with the first two. A thread that waits for the others spins, which beside
one other busy process took 4.6 s a step, and 1.2 s with the third. What the user has set wins; the record has all."""


class Child(Lines):
    """A `follow.Rank`. Started at once; ends when `kill` was called, at the latest. `lock`: a file descriptor that it
    keeps open as long as it lives."""

    def __init__(self, job: Job, rank: int, lock: int) -> None:
        self.rank = rank
        self.log = Path(job.out) / log_name(rank)
        self.log_start = self.log.stat().st_size if self.log.exists() else 0
        """Where in the log this attempt begins."""
        self.ended: dict[str, Any] | None = None
        self._kills_before = ending.kernel_oom_kills()
        reader, writer = os.pipe()
        with open(self.log, "ab") as output:
            try:
                self.process = subprocess.Popen(
                    [sys.executable, "-m", "llmsys.dispatch.worker", str(writer), str(os.getpid())],
                    stdin=subprocess.PIPE,
                    stdout=output,
                    stderr=output,
                    env={**FOR_THE_CPU, **os.environ, "OMP_NUM_THREADS": str(job.config["train"]["threads"])},
                    pass_fds=(writer, lock),
                    start_new_session=True,
                )
            finally:
                os.close(writer)
        super().__init__(reader)

    @property
    def pid(self) -> int:
        return self.process.pid

    def tell(self, **message: Any) -> None:
        assert self.process.stdin is not None
        with contextlib.suppress(BrokenPipeError):
            self.process.stdin.write(json.dumps(message).encode() + b"\n")
            self.process.stdin.flush()

    def printed(self) -> list[str]:
        """The lines that it has written into its log, blank ones left out."""
        with open(self.log, "rb") as file:
            file.seek(self.log_start)
            return [line.strip() for line in file.read().decode(errors="replace").splitlines() if line.strip()]

    def code(self) -> int:
        return self.process.wait()

    def gone(self) -> bool:
        return self.process.poll() is not None

    def verdict(self) -> Verdict:
        return ending.of_child(self.printed(), self.code(), self._kills_before)

    def interrupt(self) -> None:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self.pid, signal.SIGINT)

    def kill(self) -> None:
        kill_tree(self.process)
        self.pipe.close()
        assert self.process.stdin is not None
        with contextlib.suppress(BrokenPipeError):
            self.process.stdin.close()


def kill_tree(process: subprocess.Popen[bytes]) -> None:
    """Ends a process, its process group, and, while it lives, descendants that made groups of their own."""
    below = descendants(process.pid)
    for kill, target in ((os.killpg, process.pid), *((os.kill, pid) for pid in below)):
        try:
            kill(target, signal.SIGKILL)
        except (ProcessLookupError, PermissionError):
            continue  # gone already
    process.wait()


def descendants(root: int) -> list[int]:
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
