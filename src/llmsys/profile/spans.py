"""How long the parts of a training step take.

    with spans.step():
        with spans("forward"):
            ...

A GPU runs behind the Python that feeds it, so a clock around a call measures the call, not the work. On CUDA a span is
therefore a pair of events in the stream, read after the step has ended; on a CPU it is `perf_counter`. A span entered
several times within a step (accumulation) counts once, as the sum. The first `warmup` steps (allocator, autotuning,
page faults) are left out. Nothing is averaged here: `samples` are the raw values behind every quoted median.
"""

from __future__ import annotations

import contextlib
import statistics
import time
from collections.abc import Iterator

import torch

Mark = float | torch.cuda.Event


class Spans:
    """Time per span and step, in ms; see the file's head for its use."""

    def __init__(self, device: torch.device, warmup: int = 0) -> None:
        self.device = device
        self.warmup = warmup
        self.steps = 0
        self.entered = 0
        """Spans entered in the last step, the step itself among them."""
        self._open: list[tuple[str, Mark, Mark]] = []
        self._unread: list[tuple[str, Mark, Mark]] = []
        self._samples: dict[str, list[float]] = {}

    def _mark(self) -> Mark:
        if self.device.type != "cuda":
            return time.perf_counter()
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        return event

    @contextlib.contextmanager
    def __call__(self, name: str) -> Iterator[None]:
        """Times the body as part of span `name` of the current step."""
        start = self._mark()
        try:
            yield
        finally:
            self._open.append((name, start, self._mark()))

    @contextlib.contextmanager
    def step(self) -> Iterator[None]:
        """One step; what lies between two steps (evaluation, checkpoints) belongs to neither."""
        self._open = []
        with self("step"):
            yield
        self.entered = len(self._open)
        self.steps += 1
        self._read()  # the step before this one: the device has long finished it, so nobody waits
        if self.steps > self.warmup:
            self._unread = self._open

    def _read(self) -> None:
        sums: dict[str, float] = {}
        for name, start, end in self._unread:
            sums[name] = sums.get(name, 0.0) + milliseconds(start, end)
        for name, ms in sums.items():
            self._samples.setdefault(name, []).append(ms)
        self._unread = []

    @property
    def samples(self) -> dict[str, list[float]]:
        """`<span>_ms` -> one value a step, in the order of the steps."""
        self._read()
        return {f"{name}_ms": list(values) for name, values in self._samples.items()}

    @property
    def summary(self) -> dict[str, float]:
        """`<span>_ms_p50` -> the median over the steps."""
        return {f"{name}_p50": statistics.median(values) for name, values in self.samples.items()}

    def overhead_us_per_step(self, repeats: int = 200) -> float:
        """What the spans of one step cost themselves: as many empty ones, timed on this device, in microseconds."""
        trial = Spans(self.device)
        start = time.perf_counter()
        for _ in range(repeats):
            with trial.step(), trial("empty"):
                pass
        return (time.perf_counter() - start) * 1e6 / (2 * repeats) * self.entered


def milliseconds(start: Mark, end: Mark) -> float:
    if isinstance(start, float) and isinstance(end, float):
        return (end - start) * 1e3
    assert not isinstance(start, float)
    assert not isinstance(end, float)
    end.synchronize()
    return float(start.elapsed_time(end))
