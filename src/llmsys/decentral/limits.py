"""What a provider gives at most: it leaves where it has taken more memory than it may, and pauses while its owner needs
the machine. A thread looks.

    --limit-gib       resident memory of the process, frameworks and all; more, and it leaves
    --pause-while     a command, run every few seconds: as long as it succeeds, it pauses
    --yield-gpu       the same, as long as any other process computes on a GPU of this machine, by nvidia-smi
"""

from __future__ import annotations

import os
import shlex
import shutil
import subprocess
import threading
from collections.abc import Callable, Sequence
from pathlib import Path

EVERY_S = 1.0
ASKED_S = 10.0
"""A question that takes longer is not answered."""
QUIET = 3
"""So many times in a row nobody needs the machine, before it comes again."""
GPU = ("nvidia-smi", "--query-compute-apps=pid", "--format=csv,noheader")


class Limits:
    """`limit_gib` 0: none. `needed`: whether somebody else needs the machine; None: not asked. `why` is told what
    happens before it does. `leave`, `pause`, `resume` are called in a thread of this one's own. ValueError as of
    `resident_gib`."""

    def __init__(
        self,
        limit_gib: float,
        needed: Callable[[], bool] | None,
        why: Callable[[str], None],
        leave: Callable[[], None],
        pause: Callable[[], None],
        resume: Callable[[], None],
    ) -> None:
        if limit_gib:
            resident_gib()
        self.limit_gib, self.needed, self.why = limit_gib, needed, why
        self.leave, self.pause, self.resume = leave, pause, resume
        self._quiet: int | None = None  # looks since it was last needed; None: it is not paused
        self._left = self._watching = False

    def start(self) -> None:
        """Looks from now on, if there is anything to look at; told twice, it is as told once."""
        if not self._watching and (self.limit_gib or self.needed is not None):
            self._watching = True
            threading.Thread(target=self._watch, name="limits", daemon=True).start()

    def _watch(self) -> None:
        waiting = threading.Event()
        while not self._left:
            waiting.wait(EVERY_S)
            self.look()

    def look(self) -> None:
        """Once."""
        if self.limit_gib and (used := resident_gib()) > self.limit_gib:
            self._left = True
            self.why(f"leaves: it has {used:.2f} GiB, and --limit-gib is {self.limit_gib:g}")
            self.leave()
        elif self.needed is not None:
            self._pause(self.needed())

    def _pause(self, needed: bool) -> None:
        if needed and self._quiet is None:
            self.why("pauses: the machine is needed")
            self.pause()
        if needed:
            self._quiet = 0
        elif self._quiet is not None:
            self._quiet += 1
            if self._quiet == QUIET:
                self._quiet = None
                self.why("comes again")
                self.resume()


def resident_gib() -> float:
    """Of this process, as it is now (Linux), or as it was at most. ValueError where the system does not say."""
    own = Path("/proc/self/statm")
    if own.exists():
        return int(own.read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE") / 2**30
    try:
        import resource
    except ModuleNotFoundError:
        raise ValueError("--limit-gib: this system does not say how much memory a process has") from None
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**30  # bytes on macOS


def needed_by(command: str, *, gpu: bool) -> Callable[[], bool] | None:
    """What `--pause-while` and `--yield-gpu` ask; None where neither does. ValueError where there is no such command,
    or no nvidia-smi."""
    words = shlex.split(command)
    for name, asked in ((words[0] if words else "", command), (GPU[0], "--yield-gpu" if gpu else "")):
        if asked and shutil.which(name) is None:
            raise ValueError(f"{asked}: there is no {name} here")

    def needed() -> bool:
        return bool(words and _succeeds(words)) or (gpu and others_compute())

    return needed if words or gpu else None


def _succeeds(words: Sequence[str]) -> bool:
    try:
        return subprocess.run(words, capture_output=True, timeout=ASKED_S).returncode == 0
    except (OSError, subprocess.TimeoutExpired):
        return False


def others_compute() -> bool:
    """Whether a process that is not this one has a context on a GPU."""
    try:
        found = subprocess.run(GPU, capture_output=True, text=True, timeout=ASKED_S)
    except (OSError, subprocess.TimeoutExpired):
        return False
    pids = {int(line) for line in found.stdout.split() if line.isdigit()}
    return bool(pids - {os.getpid()})
