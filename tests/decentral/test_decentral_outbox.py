"""What a step waits for is not behind a copy of somebody's state."""

from __future__ import annotations

import asyncio

import torch

from llmsys.decentral.outbox import Outbox
from llmsys.decentral.planes.layout import packed
from llmsys.decentral.wire import Frame, encode


def frame(kind: str, size: int, **body: object) -> bytes:
    return encode(Frame(kind=kind, sender="a", to="b", body=body, tensors={"x": packed(torch.zeros(size))}))


def test_copies_wait_for_all_others_and_nothing_else_changes_its_order() -> None:
    large = 1 << 15
    copy, second = frame("state", large, keep=[0, 1]), frame("state", large, keep=[0, 2])
    ahead, small, handed_over = frame("ahead", large), frame("back", 3), frame("state", large)

    async def through() -> list[bytes | None]:
        own = Outbox()
        for each in (copy, ahead, None, second, small, handed_over):
            own.put_nowait(each)
        found = [await own.get() for _ in range(6)]
        assert own.empty()
        return found

    assert asyncio.run(through()) == [ahead, small, handed_over, copy, second, None]
