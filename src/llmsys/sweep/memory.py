"""Memory in use now, and waiting until what a run left behind is gone.

On a GPU the driver is asked, by a child: a process that asks the device itself would hold a context on it all the sweep
long, and be part of what is measured. What the children of a run had allocated is given back when they are gone, but
not at that instant, and not while one of them hangs in the driver.
"""

from __future__ import annotations

import os
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass

from llmsys import device

GIB = 2**30
_QUERY = ["nvidia-smi", "--query-gpu=memory.used,memory.total", "--format=csv,noheader,nounits"]
_ASK = """
import torch
for i in range(torch.cuda.device_count()):
    free, total = torch.cuda.mem_get_info(i)
    print((total - free) / 2**20, total / 2**20, sep=",")
"""
EVERY_S = 1.0
"""Between two looks while it is waited."""


@dataclass(frozen=True)
class Reading:
    """GiB in use on each device (of a CPU: the host), and of how many."""

    used: tuple[float, ...]
    total: tuple[float, ...]


def read(kind: str) -> Reading:
    """Of all visible CUDA devices, or of the host. On CUDA, the driver by nvidia-smi; where that does not say, each
    device by a child's torch. RuntimeError, with the child's last line, where neither does."""
    if kind == "cpu":
        total = device.host_total()
        return Reading(((total - device.host_available()) / GIB,), (total / GIB,))
    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    for command in ([*_QUERY, *(["-i", visible] if visible else [])], [sys.executable, "-c", _ASK]):
        try:
            done = subprocess.run(command, capture_output=True, text=True, check=False)
        except FileNotFoundError:  # no nvidia-smi
            continue
        if done.returncode == 0 and (reading := parsed(done.stdout)):
            return reading
    raise RuntimeError(f"sweep.baseline_gib: the device does not say how much of it is in use: {done.stderr.strip()}")


def parsed(text: str) -> Reading | None:
    """Lines of `used, total` in MiB; None for anything else, as `[N/A]` of a part of a GPU."""
    try:
        pairs = [tuple(float(part) / 1024 for part in line.split(",")) for line in text.strip().splitlines()]
        used, total = zip(*pairs, strict=True)
    except ValueError:
        return None
    return Reading(used, total)


class Baseline:
    """Memory in use at the sweep's start, which is to be reached again before each run.

    `gib`: how much more may be in use (None: nothing is looked at). `look`, `clock` and `sleep` are the world.
    """

    def __init__(
        self,
        gib: float | None,
        timeout_s: float,
        look: Callable[[], Reading],
        clock: Callable[[], float] = time.monotonic,
        sleep: Callable[[float], None] = time.sleep,
    ) -> None:
        self._gib, self._timeout_s = gib, timeout_s
        self._look, self._clock, self._sleep = look, clock, sleep
        self._first: Reading | None = None

    def wait(self) -> dict[str, float]:
        """Returns when memory is back, or when the time is up: what a record says of it, {} where it was back at once.

        `over_baseline_gib`: of the device that is furthest from its baseline, how far; negative below it.
        """
        if self._gib is None:
            return {}
        if self._first is None:
            self._first = self._look()
            return {}
        start, looks = self._clock(), 1
        while (over := self._over()) > self._gib and self._clock() - start < self._timeout_s:
            looks += 1
            self._sleep(min(EVERY_S, self._timeout_s))
        if looks == 1 and over <= self._gib:
            return {}
        return {"over_baseline_gib": round(over, 3), "waited_s": round(self._clock() - start, 1)}

    def late(self, found: dict[str, float]) -> bool:
        """Whether memory had not come back when the time was up."""
        return self._gib is not None and found.get("over_baseline_gib", 0.0) > self._gib

    def _over(self) -> float:
        assert self._first is not None
        return max(now - before for now, before in zip(self._look().used, self._first.used, strict=True))
