"""The highest rate of requests at which enough of them keep what they have to: doubled until they do not, then halved
between the two, and then tried once more with requests that the search has not seen."""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from typing import NamedTuple

MOST_PROBES = 24
MOST_TRIES = 3
LEAST = 0.01
"""Requests a second: what is not kept there is not kept at all."""


class TooFast(Exception):
    """Requests could not be sent at a rate: whether the server keeps it is not known."""


class Found(NamedTuple):
    """`rate`: 0.0 where none was kept. `bounded`: a rate above it was not kept; without that a server may do more than
    was asked of it. `confirmed`: by another draw. `undecided`: a rate at which requests could not be sent, so that the
    search has ended there; 0.0: none."""

    rate: float
    bounded: bool
    confirmed: bool
    undecided: float = 0.0


async def highest(good: Callable[[float, int], Awaitable[bool]], first: float, percent: float) -> Found:
    """`good(rate, draws)` puts the server under that load, of requests by the number `draws`; it raises `TooFast` where
    that cannot be done. What is more than `percent` above the answer was not kept, if fewer than `MOST_PROBES` were
    enough and nothing is `undecided`. Where another draw of it is not kept, lower rates are tried, by `percent` each
    time."""
    low, high, rate, undecided = 0.0, 0.0, first, 0.0
    for _ in range(MOST_PROBES):
        try:
            kept = await good(rate, 0)
        except TooFast:
            undecided = rate
            break
        low, high = (rate, high) if kept else (low, rate)
        if high and (high <= low * (1 + percent / 100) if low else high <= LEAST):
            break
        rate = (low * high) ** 0.5 if low and high else rate * 2 if low else rate / 2
    if not low or not high:
        return Found(low, bool(high), False, undecided)
    for draws in range(1, MOST_TRIES + 1):
        try:
            if await good(low, draws):
                return Found(low, True, True, undecided)
        except TooFast:
            return Found(low, True, False, undecided or low)
        low /= 1 + percent / 100
    return Found(low, True, False, undecided)
