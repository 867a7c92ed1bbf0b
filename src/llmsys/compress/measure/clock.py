"""How long a method compresses and decompresses: a clock around its own code, none around its collectives.

Compression is always the backward pass's own thread's. Decompression is a callback's where a method has one round, and
goes on beside the pass or while the pass has ended and waits; so it is kept as intervals, of which `exposed` gives what
lies after a moment.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Generator
from typing import Any

import torch

from llmsys.compress.methods.method import Exchange, Method, Part, Request, Sent


class Clocked:
    """`method`, and the seconds that its exchanges have spent since `reset`. On a GPU, which runs behind Python, it is
    waited for around each part: what is clocked there does not overlap, so it is for steps that are not timed."""

    def __init__(self, method: Method, device: torch.device) -> None:
        self.method, self.linear, self.rounds = method, method.linear, method.rounds
        self.on = True
        self.compress_s = 0.0
        self._decompressed: list[tuple[float, float]] = []
        self._lock = threading.Lock()
        self._cuda = device.type == "cuda"

    def reset(self) -> None:
        self.compress_s = 0.0
        self._decompressed = []

    @property
    def decompress_s(self) -> float:
        with self._lock:
            return sum(end - start for start, end in self._decompressed)

    def exposed(self, since: float) -> float:
        """Seconds after the moment `since` (of `time.perf_counter`) in which something was decompressed."""
        total, reached = 0.0, since
        with self._lock:
            for start, end in sorted(self._decompressed):
                total += max(0.0, end - max(start, reached))
                reached = max(reached, end)
        return total

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
                with self._lock:
                    self._decompressed.append((before, self._now()))
                sent: Sent = end.value
                return sent
            self.compress_s += self._now() - before
            yield wanted

    def _now(self) -> float:
        if self._cuda:
            torch.cuda.synchronize()
        return time.perf_counter()
