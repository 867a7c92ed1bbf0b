"""What a provider gives at most: it leaves where it has taken more memory than it may, and pauses while its owner needs
the machine. Looked at by a thread, which asks the main one by a signal, as a person would.

    --limit-gib       resident memory of the process, frameworks and all; more, and it leaves
    --pause-while     a command, run every few seconds: as long as it succeeds, it pauses
    --yield-gpu       the same, as long as any other process computes on a GPU of this machine, by nvidia-smi
"""

from __future__ import annotations

import os
import shlex
import shutil
import signal
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
    """`limit_gib` 0: none. `needed`: whether somebody else needs the machine; None: not asked. `say(signal)`: None: to
    the main thread; `why` is told first, once for each. ValueError on a system that has no such signals."""

    def __init__(
        self,
        limit_gib: float,
        needed: Callable[[], bool] | None,
        why: Callable[[str], None],
        say: Callable[[int], None] | None = None,
    ) -> None:
        if (limit_gib or needed is not None) and not hasattr(signal, "SIGUSR1"):
            raise ValueError("--limit-gib, --pause-while, --yield-gpu: need signals that this system does not have")
        self.limit_gib, self.needed, self.why, self.say = limit_gib, needed, why, say or _to_main
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
            self.say(signal.SIGTERM)
        elif self.needed is not None:
            self._pause(self.needed())

    def _pause(self, needed: bool) -> None:
        if needed and self._quiet is None:
            self.why("pauses: the machine is needed")
            self.say(signal.SIGUSR1)
        if needed:
            self._quiet = 0
        elif self._quiet is not None:
            self._quiet += 1
            if self._quiet == QUIET:
                self._quiet = None
                self.why("comes again")
                self.say(signal.SIGUSR2)


def _to_main(number: int) -> None:
    """Wakes the main thread from whatever it waits for."""
    signal.pthread_kill(threading.main_thread().ident or 0, number)


def resident_gib() -> float:
    """Of this process, as it is now (Linux), or as it was at most."""
    own = Path("/proc/self/statm")
    if own.exists():
        return int(own.read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE") / 2**30
    import resource

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
