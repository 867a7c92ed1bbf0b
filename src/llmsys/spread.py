"""How far repeats of one measurement lie apart: mean, deviation, Student's interval and coefficient of variation.

Repeats are fresh processes. Steps within one process share its memory layout, its clock and its place among other
processes, so that their deviation is far smaller than what another start of the same command would show.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache

LIMITS = {"cpu": 0.05, "cuda": 0.02}
"""A coefficient of variation over fresh processes above this says that the machine was not quiet, by kind of device."""


@dataclass(frozen=True)
class Spread:
    """Of n values: `mean`; `sd`, the deviation of a sample; `half`, half the 95 % interval of the mean, t s / sqrt(n);
    `cv`, sd / |mean|. A single value has no deviation: all three are 0."""

    mean: float
    sd: float
    half: float
    cv: float


def spread(values: Sequence[float]) -> Spread:
    """Of at least one value."""
    mean = statistics.fmean(values)
    if len(values) < 2:
        return Spread(mean, 0.0, 0.0, 0.0)
    sd = statistics.stdev(values)
    half = student(len(values) - 1) * sd / math.sqrt(len(values))
    return Spread(mean, sd, half, sd / abs(mean) if mean else 0.0)


@cache
def student(freedom: int, confidence: float = 0.95) -> float:
    """The two-sided quantile of Student's t: P(|T| < t) = `confidence`, to ten digits, by bisection."""
    low, high = 0.0, 1.0
    while _within(high, freedom) < confidence:
        low, high = high, 2 * high
    while high - low > 1e-10 * high:
        middle = (low + high) / 2
        low, high = (middle, high) if _within(middle, freedom) < confidence else (low, middle)
    return (low + high) / 2


def _within(t: float, freedom: int) -> float:
    """P(|T| < t), by the finite series for a whole number of degrees of freedom (Abramowitz and Stegun, 26.7.3-4)."""
    angle = math.atan(t / math.sqrt(freedom))
    cosine, sine = math.cos(angle), math.sin(angle)
    odd = freedom % 2
    term = total = cosine if odd else 1.0
    for k in range(2 + odd, freedom - 1, 2):
        term *= cosine * cosine * (k - 1) / k
        total += term
    if not odd:
        return sine * total
    return 2 / math.pi * (angle + (sine * total if freedom > 1 else 0.0))
