"""What paired runs say, and which of a grid's rates to try next: pure functions on numbers.

Two methods trained with the same seed share the draw of new weights and the order of the data, so their difference
seed by seed wanders less than either result. Of n differences with mean d and standard deviation s,

    d -+ t s / sqrt(n)        t: the 90 % quantile of Student's t with n - 1 degrees of freedom

is the end of the one-sided 90 % interval; the one on the bad side is how much is lost, at worst.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

CONFIDENCE = 0.9


@dataclass(frozen=True)
class Difference:
    """Ours minus theirs over `pairs` seeds; `bound` is None for a single pair, which has no deviation."""

    mean: float
    bound: float | None
    pairs: int


def difference(ours: Mapping[int, float], theirs: Mapping[int, float], *, higher: bool) -> Difference | None:
    """Of values by seed, over the seeds that both have; None without any. `higher`: more is better."""
    values = [ours[seed] - theirs[seed] for seed in sorted(ours.keys() & theirs.keys())]
    if not values:
        return None
    mean = statistics.fmean(values)
    if len(values) == 1:
        return Difference(mean, None, 1)
    reach = student(len(values) - 1) * statistics.stdev(values) / math.sqrt(len(values))
    return Difference(mean, mean - reach if higher else mean + reach, len(values))


def student(freedom: int) -> float:
    """The `CONFIDENCE` quantile of Student's t."""
    from scipy.stats import t

    return float(t.ppf(CONFIDENCE, freedom))


def within(found: Difference | None, margin: float, *, higher: bool) -> bool | None:
    """Whether the difference is, at worst, no further than `margin` on the bad side; None where there is no bound."""
    if found is None or found.bound is None:
        return None
    return found.bound > -margin if higher else found.bound < margin


def deviation(values: Sequence[float]) -> float | None:
    return statistics.stdev(values) if len(values) > 1 else None


def to_try(size: int, start: int, found: Mapping[int, float]) -> list[int]:
    """Places on a grid of `size` rates to train at next, [] when done: the best so far and its two neighbours.

    `found`: place -> how good (more is better, -inf where training diverged). It begins at `start` and climbs until the
    best has a worse rate on both sides or stands at the grid's end. That finds the grid's best where quality over the
    rate has one summit, in three to five runs.
    """
    best = summit(found)
    centre = start if best is None else best
    return [i for i in (centre - 1, centre, centre + 1) if 0 <= i < size and i not in found]


def summit(found: Mapping[int, float]) -> int | None:
    """The best place, of equals the lowest; None where every run diverged or there is none."""
    best = max(sorted(found), key=lambda i: found[i], default=None)
    return None if best is None or math.isinf(found[best]) else best


def nearest(sizes: Mapping[int, float], target: float) -> int:
    """The key whose size is nearest to `target`, of equals the smallest."""
    return min(sorted(sizes), key=lambda key: abs(sizes[key] - target))


def largest_within(sizes: Mapping[int, float], limit: float) -> int | None:
    """The largest key whose size is not above `limit`."""
    return max((key for key, size in sizes.items() if size <= limit), default=None)
