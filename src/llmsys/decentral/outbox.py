"""What is on its way to somebody: copies of stages' state wait for everything that a step waits for."""

from __future__ import annotations

import asyncio
import itertools

from llmsys.decentral.wire import header

SMALL = 64 << 10
"""Bytes of a frame that nobody waits for long."""
_NOW, _LATER, _END = range(3)


class Outbox:
    """Frames, in the order in which they were put in, but copies after the others; None, the end, after all."""

    def __init__(self) -> None:
        self._queue = asyncio.PriorityQueue[tuple[int, int, bytes | None]]()
        self._numbers = itertools.count()

    def put_nowait(self, data: bytes | None) -> None:
        self._queue.put_nowait((_rank(data), next(self._numbers), data))

    async def get(self) -> bytes | None:
        return (await self._queue.get())[-1]

    def empty(self) -> bool:
        return self._queue.empty()


def _rank(data: bytes | None) -> int:
    """Malformed for a large one that is no frame."""
    if data is None:
        return _END
    if len(data) <= SMALL:
        return _NOW
    head = header(data)
    return _LATER if head["kind"] == "state" and "keep" in head["body"] else _NOW
