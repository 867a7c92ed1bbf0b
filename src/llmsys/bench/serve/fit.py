"""From the time of a few forward passes to that of others.

    t(B, least) = base_B + slow (least - least_B)

For each number B of sequences one short pass is measured, base_B, whose roofline is least_B: with few rows a product's
kernels are others for each number of rows, and no formula has them. What a longer context adds is its roofline, `slow`
times: how far arithmetic and memory stay behind their peaks, by least squares of relative errors over the longer passes
that were measured. Between two numbers of sequences base_B and least_B lie on a line. Prefills and decoding steps are
fitted each on their own.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np


class Point(NamedTuple):
    """A pass of `batch` sequences: on its roofline, and as it was."""

    batch: int
    least_s: float
    took_s: float


@dataclass(frozen=True)
class Fit:
    """`bases`: the shortest pass of each number of sequences, in their order."""

    bases: tuple[Point, ...]
    slow: float

    def seconds(self, batch: int, least_s: float) -> float:
        """Of a pass that takes `least_s` on its roofline."""
        batches = [each.batch for each in self.bases]
        base = float(np.interp(batch, batches, [each.took_s for each in self.bases]))
        shortest = float(np.interp(batch, batches, [each.least_s for each in self.bases]))
        return base + self.slow * (least_s - shortest)


def fit(points: Sequence[Point]) -> Fit:
    """ValueError where no batch has two passes."""
    shortest: dict[int, Point] = {}
    for each in sorted(points, key=lambda point: point.least_s):
        shortest.setdefault(each.batch, each)
    bases = tuple(shortest[batch] for batch in sorted(shortest))
    longer = [(each, shortest[each.batch]) for each in points if each is not shortest[each.batch]]
    if not longer:
        raise ValueError("a fit needs two passes of one batch, of different contexts")
    more = np.array([each.least_s - base.least_s for each, base in longer])
    took = np.array([each.took_s for each, _ in longer])
    added = np.array([each.took_s - base.took_s for each, base in longer])
    slow = float((added * more / took**2).sum() / (more**2 / took**2).sum())
    return Fit(bases, max(0.0, slow))
