"""How long a method compresses and decompresses: a clock around its own code, none around its collectives."""

from __future__ import annotations

import time
from collections.abc import Generator
from typing import Any

import torch

from llmsys.compress.methods.method import Exchange, Method, Part, Request, Sent


class Clocked:
    """`method`, and the seconds that its exchanges have spent. On a GPU, which runs behind Python, its `device` is
    waited for around each part: what is clocked there does not overlap, so it is for steps that are not timed."""

    def __init__(self, method: Method, device: torch.device) -> None:
        self.method, self.linear, self.rounds = method, method.linear, method.rounds
        self.compress_s = self.decompress_s = 0.0
        self.on = True
        self._cuda = device.type == "cuda"

    def reset(self) -> None:
        self.compress_s = self.decompress_s = 0.0

    def exchange(self, part: Part) -> Exchange:
        if not self.on:
            return (yield from self.method.exchange(part))
        return (yield from self._clocked(self.method.exchange(part)))

    def _clocked(self, inner: Generator[Request | None, None, Sent]) -> Exchange:
        while True:
            before = self._now()
            try:
                wanted: Any = next(inner)
            except StopIteration as end:
                self.decompress_s += self._now() - before
                sent: Sent = end.value
                return sent
            self.compress_s += self._now() - before
            yield wanted

    def _now(self) -> float:
        if self._cuda:
            torch.cuda.synchronize()
        return time.perf_counter()
