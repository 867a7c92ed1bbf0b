"""Providers that come and go, drawn by a seed: who is up when, and how each stretch ends.

Times up and down are exponential, with means `mtbf_s` and `away_s`. A stretch ends in one of four ways: the provider
says that it goes; it dies; it hangs, to wake up after a while and go on as if nothing had happened; or it stays and is
slower for a while (a straggler).
"""

from __future__ import annotations

import heapq
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np

WAYS = ("leaves", "dies", "hangs", "slows")


@dataclass(frozen=True, kw_only=True)
class Churn:
    """`shares` of the four ways to end. `hang_s`, `slow_s`: means of how long; `slowdown` of a straggler. ValueError
    for what cannot be."""

    mtbf_s: float = 3600.0
    away_s: float = 600.0
    shares: tuple[float, float, float, float] = (0.3, 0.4, 0.2, 0.1)
    hang_s: float = 30.0
    slow_s: float = 60.0
    slowdown: float = 3.0

    def __post_init__(self) -> None:
        for key in ("mtbf_s", "away_s", "hang_s", "slow_s"):
            if not getattr(self, key) > 0:
                raise ValueError(f"{key}={getattr(self, key)}: must be positive")
        if len(self.shares) != len(WAYS) or min(self.shares) < 0 or not math.isclose(sum(self.shares), 1.0):
            raise ValueError(f"shares={list(self.shares)}: must be four, 0 or more, and 1 altogether")
        if self.slowdown < 1:
            raise ValueError(f"slowdown={self.slowdown}: must be 1 or more")


class Turn(NamedTuple):
    """At `at_s` provider `place` `what`: joins, leaves, dies, hangs, wakes, slows or recovers."""

    at_s: float
    place: int
    what: str


def turns(count: int, churn: Churn, seed: int, initially: Sequence[int] | None = None) -> Iterator[Turn]:
    """Of `count` providers, in order of time, without end. `initially`: those that are up at the beginning; the others
    join after a time away. The same seed gives the same turns."""
    random = np.random.default_rng(seed)
    up = set(range(count) if initially is None else initially)
    heap: list[tuple[float, int, str]] = []
    for place in range(count):
        mean = churn.mtbf_s if place in up else churn.away_s
        what = _way(random, churn) if place in up else "joins"
        heapq.heappush(heap, (float(random.exponential(mean)), place, what))
    while True:
        at_s, place, what = heapq.heappop(heap)
        yield Turn(at_s, place, what)
        if what in ("leaves", "dies"):
            then, after = "joins", churn.away_s
        elif what == "hangs":
            then, after = "wakes", churn.hang_s
        elif what == "slows":
            then, after = "recovers", churn.slow_s
        else:
            then, after = _way(random, churn), churn.mtbf_s
        heapq.heappush(heap, (at_s + float(random.exponential(after)), place, then))


def _way(random: np.random.Generator, churn: Churn) -> str:
    return WAYS[int(random.choice(len(WAYS), p=churn.shares))]
