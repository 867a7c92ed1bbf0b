"""Whether the machine was the same all along: what one cell, measured again and again, says of all others.

Clocks, heat and other people's work change a machine in the course of hours, and a sweep without a reference takes that
for an effect of its axes. The trend is Theil and Sen's: the median of the slopes between all pairs, which one bad
measurement does not move.
"""

from __future__ import annotations

import datetime
import itertools
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass


@dataclass(frozen=True)
class Drift:
    """`median_ms` of the reference's steps; `percent`: the trend over the sweep, in percent of that; `worst_percent`:
    how far one measurement was off; `off`: the runs measured while it was, and by how many percent."""

    median_ms: float
    percent: float
    worst_percent: float
    measured: int
    off: Mapping[str, float]


def seconds(started: str) -> float:
    """A record's `started` as a number."""
    return datetime.datetime.fromisoformat(started).timestamp()


def drift(references: Sequence[tuple[float, float]], cells: Mapping[str, float], tolerance: float) -> Drift | None:
    """`references`: (when, ms a step) of the reference cell; `cells`: run id -> when. None of fewer than two.

    A cell was measured while the reference was off if the measurement before or the one after it is further from the
    median than `tolerance`.
    """
    if len(references) < 2:
        return None
    ordered = sorted(references)
    median = statistics.median(ms for _, ms in ordered)
    slopes = [(b[1] - a[1]) / (b[0] - a[0]) for a, b in itertools.combinations(ordered, 2) if b[0] > a[0]]
    trend = statistics.median(slopes) * (ordered[-1][0] - ordered[0][0]) if slopes else 0.0
    shares = [ms / median - 1 for _, ms in ordered]
    off = {}
    for run, when in cells.items():
        after = next((i for i, (at, _) in enumerate(ordered) if at >= when), len(ordered) - 1)
        beside = [shares[i] for i in {max(after - 1, 0), after}]
        if (worst := max(beside, key=abs)) and abs(worst) > tolerance:
            off[run] = 100 * worst
    return Drift(median, 100 * trend / median, 100 * max(shares, key=abs), len(ordered), off)
