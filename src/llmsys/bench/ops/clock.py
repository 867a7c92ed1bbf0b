"""How long an operator takes: repeated until its times agree, or time is up.

A sample is the mean of as many calls, one after another, as take long against the clock's own grain; on CUDA between
two events in the stream. Samples are taken until half of them lie within `spread` of their median (the distance between
the quartiles over it), at least `LEAST`. What is quoted is the median.

Operands that stay in a cache make memory look faster than it is in a step, where others come in between. So a caller
gives several sets of operands, as many as exceed a cache together (`copies`), and they take turns. Sets of less than
`SMALL` are left alone: they lie in a core's own cache, where a step, which has made them a moment before, finds them
too.

Ranks that measure together (collectives) take as many samples each, as the first of them decides, and of each sample
the slowest rank's time counts.
"""

from __future__ import annotations

import itertools
import math
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch

from llmsys import schema
from llmsys.comm import collectives
from llmsys.train.peaks import wait

LEAST = 5
FEWEST = 3
"""Samples, where already these take longer than `most_s`."""
GRAIN_S = {"cpu": 2e-4, "cuda": 1e-3}
COLD_BYTES = 2**27
"""More than the caches of the devices there are, but for servers' largest."""
SMALL = 2**18
"""Bytes of a set of operands."""


@dataclass(frozen=True, kw_only=True)
class Clock:
    """`together`: the ranks act in step."""

    device: torch.device
    spread: float
    least_s: float
    most_s: float
    together: bool = False

    @classmethod
    def of(cls, task: schema.Ops, device: torch.device, *, together: bool = False) -> Clock:
        return cls(device=device, spread=task.spread, least_s=task.least_s, most_s=task.most_s, together=together)

    def samples(self, acts: Sequence[Callable[[], object]]) -> list[float]:
        """Seconds of a call, of each sample. `acts`, of the same work, take turns."""
        turns = itertools.cycle(acts)
        for _ in acts:
            next(turns)()  # starts libraries, and chooses kernels
        number = self._agreed(max(1, math.ceil(GRAIN_S[self.device.type] / max(self._sample(turns, 1), 1e-9))))
        found: list[float] = []
        spent = 0.0
        while not self._agreed(self._enough(found, spent)):
            found.append(self._sample(turns, number))
            spent += found[-1] * number
        if not self.together:
            return found
        mine = torch.tensor(found, dtype=torch.float64, device=self.device)
        return [float(slowest) for slowest in collectives.all_gather(mine).amax(0)]

    def once(self, acts: Sequence[Callable[[], object]]) -> float:
        """Seconds of a call: the mean of each of `acts` once."""
        return self._sample(itertools.cycle(acts), len(acts))

    def _enough(self, found: Sequence[float], spent: float) -> bool:
        if spent >= self.most_s:
            return len(found) >= FEWEST
        return len(found) >= LEAST and spent >= self.least_s and spread(found) <= self.spread

    def _agreed(self, value: int) -> int:
        """The first rank's word, where ranks act together."""
        return collectives.agree(value, self.device) if self.together else value

    def _sample(self, turns: itertools.cycle[Callable[[], object]], number: int) -> float:
        if self.device.type == "cuda":
            start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            wait(self.device)
            start.record()
            for _ in range(number):
                next(turns)()
            end.record()
            end.synchronize()
            return float(start.elapsed_time(end)) / 1e3 / number
        before = time.perf_counter()
        for _ in range(number):
            next(turns)()
        return (time.perf_counter() - before) / number


def spread(seconds: Sequence[float]) -> float:
    """The distance of the quartiles over the median."""
    low, middle, high = statistics.quantiles(seconds, n=4, method="inclusive")
    return (high - low) / middle


def copies(nbytes: int) -> int:
    """How many sets of operands of `nbytes` take turns."""
    return 1 if nbytes < SMALL else math.ceil(COLD_BYTES / nbytes)


@dataclass(frozen=True, kw_only=True)
class Timed:
    """An operator's samples under its key, and what a call does: FLOPs, or bytes that it reads and writes at least.
    `peak`: of FLOP/s or bytes/s, where one is known. `rows`: of the table of modules that have it."""

    key: str
    seconds: list[float]
    flops: float = 0.0
    nbytes: float = 0.0
    peak: float | None = None
    rows: tuple[str, ...] = ()

    @property
    def median_s(self) -> float:
        return statistics.median(self.seconds)

    def summary(self) -> dict[str, float]:
        """`<key>/ms`, `/spread_percent`, `/tflops` or `/gb_per_s`, and `/peak_percent`."""
        found = {"ms": self.median_s * 1e3, "spread_percent": 100 * spread(self.seconds)}
        if self.flops:
            found["tflops"] = self.flops / self.median_s * 1e-12
        elif self.nbytes:
            found["gb_per_s"] = self.nbytes / self.median_s * 1e-9
        if self.peak:
            found["peak_percent"] = 100 * (self.flops or self.nbytes) / self.median_s / self.peak
        return {f"{self.key}/{name}": value for name, value in found.items()}

    @property
    def samples(self) -> dict[str, list[float]]:
        return {f"{self.key}/ms": [seconds * 1e3 for seconds in self.seconds]}
