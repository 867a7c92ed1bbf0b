"""How fast the machine at hand runs each kind of operator, by size: what `speeds` interpolates between.

Results are new tensors, as in a step: on a CPU large ones are pages that the system has to give. Products are measured
in the three orientations of a linear layer (y = x W^T, dx = dy W, dW = dy^T x), and their mean time counts. From small
operators' times what it takes to start one is taken off, which a prediction adds for itself.

Letters: B batch, H heads, L length, W width of a head.
"""

from __future__ import annotations

import itertools
import statistics
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from llmsys import schema
from llmsys.bench.ops import transfers
from llmsys.bench.ops.clock import Clock
from llmsys.cost import links
from llmsys.cost.work import WHOLE
from llmsys.models.build import DTYPES

Rates = Iterator[tuple[str, float]]
"""(key of the summary, value), as `machine.calibrated` reads them."""
CHAIN = 200
"""Operators in a row, by which starting one is measured."""
LEAST = 0.1
"""Share of a measured time that is taken to be work, however long starting it seems to take."""
SIZES: dict[str, tuple[int, ...]] = {"cpu": (32, 64, 128, 256, 512, 1024), "cuda": (256, 512, 1024, 2048, 4096, 8192)}
"""Sides of square products."""
STREAMS: dict[str, tuple[int, ...]] = {"cpu": tuple(range(12, 25, 2)), "cuda": tuple(range(14, 29, 2))}
"""Elements of streaming operators, as powers of 2."""
MESSAGES = tuple(2**i for i in (12, 16, 20, 22, 24))
"""Bytes of tensors in collectives."""


@dataclass(frozen=True)
class Probes:
    """Of `device`, with the heads of `model`; `precision` is measured beside fp32. `most_s` of one operator."""

    device: torch.device
    model: schema.Transformer
    precision: str
    most_s: float = 0.12

    def clock(self, *, together: bool = False) -> Clock:
        return Clock(device=self.device, spread=0.1, least_s=self.most_s / 4, most_s=self.most_s, together=together)

    def run(self, world: int) -> Rates:
        """Everything, in the order of importance; collectives where there are several ranks."""
        starts = self.starts()
        yield from ((f"start/{name}", seconds) for name, seconds in starts.items())
        start = starts["forward"] if self.device.type == "cpu" else 0.0
        for precision in dict.fromkeys((self.precision, "fp32")):
            yield from self._products(precision, start)
            yield from self._batched(precision, start)
            yield from self._fused(precision, start)
        yield from self._streams(start)
        yield from self._adam("adam", self.device)
        yield from self._adam8()
        yield from self._copies()
        yield from self._widening()
        if world > 1:
            yield from self._collectives(world)

    def _seconds(self, act: Callable[[], object]) -> float:
        return statistics.median(self.clock().samples([act]))

    def _random(self, *shape: int, dtype: str = "fp32", grad: bool = False) -> Tensor:
        return torch.randn(shape, dtype=DTYPES[dtype], device=self.device).requires_grad_(grad)

    def starts(self) -> dict[str, float]:
        """Seconds of the host for an operator that does next to nothing, forward and in the backward pass."""
        x, w = self._random(8, grad=True), self._random(8, grad=True)
        found: dict[str, list[float]] = {"forward": [], "backward": []}
        for _ in range(12):
            y = x
            begun = time.perf_counter()
            for _ in range(CHAIN):
                y = y * w
            between = time.perf_counter()
            y.backward(torch.ones_like(y))
            ended = time.perf_counter()
            found["forward"].append((between - begun) / CHAIN)
            found["backward"].append((ended - between) / CHAIN / 3)  # two products, and a sum with w's gradient
        return {name: statistics.median(values[2:]) for name, values in found.items()}

    def _rate(self, kind: str, size: float, done: float, seconds: float, start: float) -> tuple[str, float]:
        return f"rate/{kind}/{size:.6g}", done / max(seconds - start, LEAST * seconds)

    def _products(self, precision: str, start: float) -> Rates:
        for n in SIZES[self.device.type]:
            x, w, y = (self._random(n, n, dtype=precision) for _ in range(3))
            acts: tuple[Callable[[], Tensor], ...] = (lambda: F.linear(x, w), lambda: y @ w, lambda: y.T @ x)  # noqa: B023
            seconds = statistics.mean(map(self._seconds, acts))
            flops = 2.0 * n**3
            yield self._rate(f"product/{precision}", flops, flops, seconds, start)

    def _batched(self, precision: str, start: float) -> Rates:
        h, w = self.model.num_heads, self.model.head_width
        for length in (32, 128, 512):
            q, p = self._random(h, length, w, dtype=precision), self._random(h, length, length, dtype=precision)
            acts: tuple[Callable[[], Tensor], ...] = (lambda: q @ q.transpose(1, 2), lambda: p @ q)  # noqa: B023
            seconds, flops = statistics.mean(map(self._seconds, acts)), 2.0 * length * length * w
            yield self._rate(f"batched/{precision}", flops, h * flops, seconds, start)

    def _fused(self, precision: str, start: float) -> Rates:
        """A causal kernel, and one that skips nothing. The whole square counts of both; its derivative as five
        products."""
        h, w = self.model.num_heads, self.model.head_width
        for length, kind in itertools.product((64, 256, 1024), ("", WHOLE)):
            q, k, v = (self._random(1, h, length, w, dtype=precision, grad=True) for _ in "qkv")
            flops = 2.0 * h * length * length * w

            def forward(q: Tensor = q, k: Tensor = k, v: Tensor = v, causal: bool = not kind) -> Tensor:
                return F.scaled_dot_product_attention(q, k, v, is_causal=causal)

            out = forward()
            dy = torch.ones_like(out)

            def backward(out: Tensor = out, dy: Tensor = dy, inputs: Any = (q, k, v)) -> object:
                return torch.autograd.grad(out, inputs, dy, retain_graph=True)

            yield self._rate(f"{kind}attention/{precision}", 2 * flops, 2 * flops, self._seconds(forward), start)
            seconds = self._seconds(backward)
            yield self._rate(f"{kind}attention_backward/{precision}", 5 * flops, 5 * flops, seconds, start)

    def _streams(self, start: float) -> Rates:
        for power in STREAMS[self.device.type]:
            n = 2**power
            x, y = self._random(n), self._random(n)
            yield self._rate("stream", 12 * n, 12 * n, self._seconds(lambda: x + y), start)  # noqa: B023
            yield self._rate("exp", 8 * n, 8 * n, self._seconds(lambda: F.silu(x)), start)  # noqa: B023

    def _adam(self, kind: str, device: torch.device) -> Rates:
        """28 bytes an element: weight, gradient and moments read, all but the gradient written."""
        for power in (12, 16, 20, 23):
            weight = torch.zeros(2**power, device=device, requires_grad=True)
            weight.grad = torch.ones_like(weight)
            optimizer = torch.optim.AdamW([weight], lr=1e-3, fused=True)
            nbytes = 28.0 * 2**power
            clock = Clock(device=device, spread=0.1, least_s=self.most_s / 4, most_s=self.most_s)
            yield f"rate/{kind}/{nbytes:.6g}", nbytes / statistics.median(clock.samples([optimizer.step]))

    def _adam8(self) -> Rates:
        """With moments in 8 bits, by bitsandbytes where it is there: 16 bytes an element, of which moments are 4. On a
        CPU its kernel is no faster for that."""
        try:
            from llmsys.train.adamw_8bit import AdamW8bit
        except ImportError:
            return
        for power in (12, 16, 20, 22):
            weight = torch.zeros(2**power, device=self.device, requires_grad=True)
            weight.grad = torch.ones_like(weight)
            optimizer = AdamW8bit([weight], lr=1e-3)
            nbytes = 16.0 * 2**power
            yield f"rate/adam8/{nbytes:.6g}", nbytes / self._seconds(optimizer.step)

    def _copies(self) -> Rates:
        """`copy_gb_per_s` between device and host, `host_adam_gb_per_s`; of a CPU from memory to memory."""
        n = 2**24
        host = torch.ones(n, pin_memory=self.device.type == "cuda")
        here = torch.empty(n, device=self.device)
        yield "copy_gb_per_s", 4 * n / self._seconds(lambda: here.copy_(host, non_blocking=True)) / 1e9
        *_, (_, rate) = self._adam("host_adam", torch.device("cpu"))
        yield "host_adam_gb_per_s", rate / 1e9

    def _widening(self) -> Rates:
        """4 bits made wide, by bitsandbytes where it is there."""
        try:
            from bitsandbytes import functional as bnb
        except ImportError:
            return
        n = 1024
        packed, state = bnb.quantize_4bit(self._random(n, n), quant_type="nf4", compress_statistics=True)
        nbytes = n * n * (0.5 + 4)
        seconds = self._seconds(lambda: bnb.dequantize_4bit(packed, state))
        yield f"rate/dequant/{nbytes / 2:.6g}", nbytes / seconds

    def _collectives(self, world: int) -> Rates:
        """`alpha_s` and `beta_s` of each kind: `cost.links.Line`."""
        times: dict[str, list[tuple[float, float]]] = {}
        for timed in transfers.exchange(MESSAGES, self.clock(together=True), None):
            times.setdefault(timed.kind, []).append((timed.nbytes, timed.median_s))
        for kind, points in times.items():
            line = links.fit([size for size, _ in points], [s for _, s in points], kind=kind, world=world)
            yield f"alpha_s/{kind}", line.alpha_s
            yield f"beta_s/{kind}", line.beta_s
