"""Frames in pieces, each a sign of life, where a frame may take a minute; and lines that are as slow as told.

0 | bytes     a piece that others follow
1 | bytes     the last, or only, piece of a frame
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable, Iterator
from dataclasses import dataclass

from llmsys.decentral.wire import FRAME_BYTES, Malformed

PIECE_BYTES = 64 << 10
"""A second of a line of half a megabit."""
MORE, LAST = b"\0", b"\1"


def pieces(data: bytes) -> Iterator[bytes]:
    """At least one."""
    at = 0
    while len(data) - at > PIECE_BYTES:
        yield MORE + data[at : at + PIECE_BYTES]
        at += PIECE_BYTES
    yield LAST + data[at:]


class Joined:
    """Makes frames of pieces again."""

    def __init__(self) -> None:
        self._held: list[bytes] = []
        self._size = 0

    def add(self, piece: bytes) -> bytes | None:
        """A frame, where this was its last piece. Malformed for what is no piece, and as soon as one is too large."""
        flag, data = piece[:1], piece[1:]
        self._size += len(data)
        if flag not in (MORE, LAST) or self._size > FRAME_BYTES:
            raise Malformed(f"a piece of {len(piece)} bytes, of a frame of {self._size}")
        if flag == MORE:
            self._held.append(data)
            return None
        whole = b"".join((*self._held, data)) if self._held else data
        self._held, self._size = [], 0
        return whole


@dataclass(frozen=True, kw_only=True)
class Slow:
    """A line of 10**6 bit/s each way. Of `delay_ms` each of the two ways has half: what one behind such a line sends to
    another behind such a line arrives `delay_ms` after it was sent."""

    up_mbit: float
    down_mbit: float
    delay_ms: float = 0.0


class Direction:
    """One way of a slow line, which carries one message at a time."""

    def __init__(self, mbit: float, delay_s: float) -> None:
        self.mbit, self.delay_s = mbit, delay_s
        self._free_s = 0.0

    def busy_until(self, nbytes: int, now: float) -> float:
        """When the line has carried a message that begins now, or as soon as it is free."""
        self._free_s = max(now, self._free_s) + nbytes * 8e-6 / self.mbit
        return self._free_s

    def received_at(self, nbytes: int, now: float) -> float:
        """When one is through whose last byte comes now, and which came in as it was being sent."""
        self._free_s = max(now, self._free_s + nbytes * 8e-6 / self.mbit)
        return self._free_s


async def slowed(source: AsyncIterator[bytes], way: Direction | None) -> AsyncIterator[bytes]:
    """The same, as such a line carries it, one after the other; None: as it comes."""
    if way is None:
        async for each in source:
            yield each
        return
    loop, under_way = asyncio.get_running_loop(), asyncio.Queue[tuple[float, bytes | None]]()

    async def carry() -> None:
        try:
            async for each in source:
                await until(way.busy_until(len(each), loop.time()))
                under_way.put_nowait((loop.time() + way.delay_s, each))
        finally:
            under_way.put_nowait((0.0, None))

    carrying = asyncio.create_task(carry())
    try:
        while (item := await under_way.get())[1] is not None:
            await until(item[0])
            yield item[1]
    finally:
        carrying.cancel()


def arrived(way: Direction | None, nbytes: int, what: Callable[[], None] | None) -> None:
    """Of a message that has just come: calls `what`, if there is such, when it is through; None: now."""
    if way is None:
        if what is not None:
            what()
        return
    loop = asyncio.get_running_loop()
    through = way.received_at(nbytes, loop.time()) + way.delay_s
    if what is not None:
        loop.call_at(through, what)


async def until(seconds: float) -> None:
    """Of the loop's clock."""
    left = seconds - asyncio.get_running_loop().time()
    if left > 0:
        await asyncio.sleep(left)
