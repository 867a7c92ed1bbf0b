"""The highest rate of requests at which enough of them keep what they have to: doubled until they do not, then halved
between the two."""

from __future__ import annotations

from collections.abc import Awaitable, Callable

MOST_PROBES = 24
LEAST = 0.01
"""Requests a second: what is not kept there is not kept at all."""


async def highest(good: Callable[[float], Awaitable[bool]], first: float, percent: float) -> float:
    """0.0 where not even the least is kept. `good(rate)` puts the server under that load; the answer was kept, and what
    is more than `percent` above it was not, if fewer than `MOST_PROBES` were enough."""
    low, high, rate = 0.0, 0.0, first
    for _ in range(MOST_PROBES):
        if await good(rate):
            low = rate
        else:
            high = rate
        if high and low and high <= low * (1 + percent / 100):
            break
        if high and not low and high <= LEAST:
            break
        rate = (low * high) ** 0.5 if low and high else rate * 2 if low else rate / 2
    return low
