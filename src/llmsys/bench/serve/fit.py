"""From the time of a few forward passes to that of others: what a pass takes beyond its roofline.

    t = start + slow * least_s(work)

`start`: what launching a model's kernels takes, whatever their size; `slow`: how far arithmetic and memory stay behind
their peaks. Both are fitted to passes that were measured, by least squares of relative errors, and neither is negative.
Prefills and decoding steps are fitted each on their own: their kernels are others.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np


@dataclass(frozen=True)
class Fit:
    """Seconds, and a factor."""

    start_s: float
    slow: float

    def seconds(self, least_s: float) -> float:
        """Of a pass that takes `least_s` on its roofline."""
        return self.start_s + self.slow * least_s


def fit(points: Sequence[tuple[float, float]]) -> Fit:
    """Of (least_s, measured_s). ValueError for fewer than two."""
    if len(points) < 2:
        raise ValueError("a fit needs two passes that were measured")
    least, took = (np.array(each) for each in zip(*points, strict=True))
    rows = np.stack([1 / took, least / took], axis=1)  # relative errors: a short pass counts as much as a long one
    (start, slow), *_ = np.linalg.lstsq(rows, np.ones(len(took)), rcond=None)
    if start < 0:
        start, slow = 0.0, float((least / took).sum() / ((least / took) ** 2).sum())
    elif slow < 0:
        start, slow = float((1 / took).sum() / (1 / took**2).sum()), 0.0
    return Fit(float(start), float(slow))


def error_percent(own: Fit, points: Sequence[tuple[float, float]]) -> float:
    """Mean of absolute relative errors over passes."""
    return float(np.mean([100 * abs(own.seconds(least) / took - 1) for least, took in points]))
