"""How long a step's collectives and its copies between host and device take themselves, whatever they hide behind.

Engines exchange gradients while the backward pass goes on, gather weights before they are needed and copy behind the
arithmetic, so no span around a call times them. torch's profiler does, in one step that is not timed otherwise: gloo's
work on its own threads, NCCL's kernels and the copies in their streams. Overlapping ones count once. A collective lasts
until the slowest rank has come, so waiting for it is in the number, on the ranks that wait.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterable, Iterator
from typing import Any

import torch
from torch.autograd.profiler_util import FunctionEvent

COPIES = ("Memcpy HtoD", "Memcpy DtoH")


class Busy:
    """`with busy():` around a step; `summary` then has `communication_busy_ms` and, on CUDA where the engine
    `offloads`, `offload_busy_ms`: the copies between host and device, of which those of a batch are a small part.
    Elsewhere these are all that is copied, and no offload. Neither key where nothing was seen."""

    def __init__(self, device: torch.device, *, offloads: bool) -> None:
        self.device, self.offloads = device, offloads
        self.summary: dict[str, float] = {}

    @contextlib.contextmanager
    def __call__(self) -> Iterator[None]:
        kinds = [torch.profiler.ProfilerActivity.CPU]
        if self.device.type == "cuda":
            kinds.append(torch.profiler.ProfilerActivity.CUDA)
        with torch.profiler.profile(activities=kinds) as seen:
            yield
            if self.device.type == "cuda":
                torch.cuda.synchronize(self.device)
        events: Any = seen.events()
        self.summary = summarise(events, offloads=self.offloads)


def summarise(events: Iterable[FunctionEvent], *, offloads: bool) -> dict[str, float]:
    """The summary of a profile's events."""
    spans: dict[str, list[tuple[float, float]]] = {"communication": [], "offload": []}
    for event in events:
        on_device = event.device_type == torch.autograd.DeviceType.CUDA
        if event.name.startswith("gloo:") or (on_device and event.name.startswith("nccl")):
            kind = "communication"
        elif offloads and on_device and event.name.startswith(COPIES):
            kind = "offload"
        else:
            continue
        spans[kind].append((event.time_range.start, event.time_range.end))
    return {f"{kind}_busy_ms": covered(found) / 1e3 for kind, found in spans.items() if found}


def covered(spans: Iterable[tuple[float, float]]) -> float:
    """How long at least one of the spans (begin, end) lasts."""
    total, until = 0.0, float("-inf")
    for begin, end in sorted(spans):
        total += max(0.0, end - max(begin, until))
        until = max(until, end)
    return total
