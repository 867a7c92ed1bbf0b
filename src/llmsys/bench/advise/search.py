"""The micro-batch of a combination: the largest that fits, or the fastest, in as few predictions as can be.

Memory grows with the micro-batch, nearly as a straight line, or as the largest of several (a step's phases). Of such a
function a secant through two sizes that fit never lies above it behind them: a size at which the secant is over the
memory does not fit. So three predictions are mostly enough, 1, 2 and the largest.
"""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Callable, Sequence

from llmsys.bench.advise.cells import Cell

Probe = Callable[[int], Cell]
"""Of a micro-batch."""
FEW = 16
"""So many sizes are each tried."""


class Search:
    """Of one combination, among `sizes`, ascending."""

    def __init__(self, sizes: Sequence[int], probe: Probe) -> None:
        self.sizes, self._probe = sizes, probe
        self.seen: dict[int, Cell] = {}
        """By micro-batch."""

    def at(self, index: int) -> Cell:
        size = self.sizes[index]
        if size not in self.seen:
            self.seen[size] = self._probe(size)
        return self.seen[size]

    def smallest(self) -> Cell:
        return self.at(0)

    def largest(self) -> Cell | None:
        """That fits; None where none does."""
        low, high = -1, len(self.sizes)
        guess = 0
        while high - low > 1:
            if self.at(guess).fits:
                low = guess
            else:
                high = guess
            if self._proven(low, high):
                break
            guess = self._next(low, high)
        return self.at(low) if low >= 0 else None

    def fastest(self) -> Cell | None:
        """Of those that fit, the most tokens a second: of many sizes the largest, for what a step costs once is then
        shared by most, or one that was seen on the way; of few all are tried."""
        top = self.largest()
        if top is None:
            return None
        last = bisect_right(self.sizes, top.micro_batch) - 1
        if len(self.sizes) <= FEW:
            for index in range(last):
                self.at(index)
        fitting = [cell for cell in self.seen.values() if cell.fits]
        return max(fitting, key=lambda cell: (cell.tokens_per_s, -cell.micro_batch))

    def _slope(self, low: int) -> float | None:
        """Bytes that one more example takes, by the two largest sizes that fit."""
        below = [size for size, cell in self.seen.items() if cell.fits and size < self.sizes[low]]
        if low < 0 or not below:
            return None
        near, far = self.seen[max(below)], self.at(low)
        return (far.peak_bytes - near.peak_bytes) / (far.micro_batch - near.micro_batch)

    def _proven(self, low: int, high: int) -> bool:
        """Whether the next size cannot fit, by the secant."""
        slope = self._slope(low)
        if slope is None or low + 1 >= high:
            return False
        top = self.at(low)
        return top.peak_bytes + slope * (self.sizes[low + 1] - top.micro_batch) > top.capacity_bytes

    def _next(self, low: int, high: int) -> int:
        """Where the secant meets the memory; in between where it misleads, as by sizes that it has tried in vain."""
        slope = self._slope(low)
        if slope is None:
            return low + 1
        failed = [cell for size, cell in self.seen.items() if not cell.fits]
        if len(failed) > 1 or slope <= 0:
            return (low + high) // 2 if high < len(self.sizes) or slope > 0 else high - 1
        top = self.at(low)
        reach = top.micro_batch + (top.capacity_bytes - top.peak_bytes) / slope
        return min(max(bisect_right(self.sizes, reach) - 1, low + 1), high - 1)
