"""The largest value that runs, found in few runs: from a guess outwards in steps that double, then by bisection.

The guess is what is predicted to fit. If it is good, the limit lies within a first step of a sixteenth, and bisection
has little left to do; if it is bad, the steps soon make up for it. All here are pure functions on what has been seen.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass


@dataclass(frozen=True)
class Bracket:
    """`ran`: the largest value below `failed` that ran, 0 where none has; `failed`: the smallest that did not."""

    ran: int = 0
    failed: int | None = None

    @classmethod
    def of(cls, outcomes: Mapping[int, bool]) -> Bracket:
        """From what has been seen: value -> whether it ran. What ran above one that did not does not count."""
        failed = min((value for value, ran in outcomes.items() if not ran), default=None)
        return cls(max((v for v, ran in outcomes.items() if ran and (failed is None or v < failed)), default=0), failed)


def next_probe(bracket: Bracket, start: int, limit: int, within: float = 0.0) -> int | None:
    """The value to try next, in [1, limit]; None when the bracket is closed, to a share `within` of what runs.

    `start`: the guess, which must be the first value tried.
    """
    ran, failed = bracket.ran, bracket.failed
    start = min(max(start, 1), limit)
    gap = max(1, start // 16)
    if failed is None:
        if not ran:
            return start
        return None if ran >= limit else min(limit, ran + max(ran - start, 0) + gap)
    if failed <= 1:
        return None
    if not ran:
        return max(1, failed - max(start - failed, 0) - gap)
    return (ran + failed) // 2 if failed - ran > max(1, int(within * ran)) else None
