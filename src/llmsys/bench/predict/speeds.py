"""How long operators take on a device: a rate for each kind, by size and precision; listed, or measured on the spot.

A product of 10**7 FLOPs does not reach the rate of one of 10**11, nor a pass over 64 KiB that of one over 64 MiB.
Measured, a rate is a curve: points (size, FLOP/s or bytes/s), between which it goes straight in logarithms, and beyond
which it stays; `cost.work` says what the kinds are and what a size is. Listed, it is one number, and each launch takes
a tail beside its work: many matrices in one launch have one tail. A device that works behind its
host (CUDA) has so much in flight that an operator takes the longer one of its arithmetic and its bytes, and is idle
where the host cannot start operators so fast. A CPU takes the sum, since a product is measured on operands that lie in
its cache, and a step's come from memory; and it pays for each start.
"""

from __future__ import annotations

import math
from bisect import bisect_right
from collections.abc import Iterable, Mapping
from dataclasses import dataclass

from llmsys.cost.hardware import Device
from llmsys.cost.work import AGAIN, ARITHMETIC, BACKWARD, FORWARD, WHOLE, Op

PRECISIONS = {1: "fp8", 2: "bf16", 4: "fp32"}
"""By bytes an element."""
Curve = tuple[tuple[float, float], ...]

FUSED, FUSED_BACKWARD, CAUSAL = 0.7, 0.6, 1.75
"""Fused attention: shares of the rate of large products where nothing is skipped, and how many times as fast a causal
kernel is, by the whole square. FlashAttention-2 (arXiv 2307.08691): 50 to 73 % of an A100's peak forward, up to 63 %
backward, and 1.7 to 1.8 times as fast with a causal mask; large products reach 85 % of it."""
MEMORY = 0.89
"""Of the bandwidth, in operators that stream: an A800 PCIe's 1727 of 1935 GB/s (github.com/mli/transformers-benchmarks,
issue 4)."""
BATCHED, WIDENING = 0.5, 0.5
"""Assumed: eager attention's products, of the rate of large ones (most of them are paid by their bytes); making 4 bits
wide, of the bandwidth."""
SHARES = {
    "product": 1.0,
    "batched": BATCHED,
    "attention": CAUSAL * FUSED,
    "attention_backward": CAUSAL * FUSED_BACKWARD,
    f"{WHOLE}attention": FUSED,
    f"{WHOLE}attention_backward": FUSED_BACKWARD,
}
"""By kind, of the rate of large products."""
TAIL_S, KERNEL_S = 10e-6, 2e-6
"""Assumed: what a kernel of matrix products takes beside its arithmetic, its start and its last wave; and any other."""
START_S = {FORWARD: 15e-6, AGAIN: 15e-6, BACKWARD: 8e-6}
"""Assumed: what the host takes to start an operator, in Python and in autograd's own thread. A LLaMA block of
transformers is about 35 operators forward, so 32 of them take 17 ms."""


@dataclass(frozen=True, kw_only=True)
class Speeds:
    """`curves`: `<kind>/<precision>` of `ARITHMETIC`, and `<kind>` of those that are paid by bytes. `start_s`: by pass,
    of an operator. `behind`: the device works behind the host. `product_s`, `kernel_s`: what each launch takes beside
    its arithmetic, or its bytes; 0 where the curves have it, since they were measured."""

    curves: Mapping[str, Curve]
    start_s: Mapping[str, float]
    behind: bool
    product_s: float = 0.0
    kernel_s: float = 0.0

    def rate(self, kind: str, size: float, width: int = 4) -> float:
        """FLOP/s or bytes/s. A kind that was not measured is as fast as the one that it is most like."""
        return at(self.curves[self._known(kind, width)], size)

    def instead(self, kind: str, width: int = 4) -> str:
        """In words, if the speed of another kind or precision stands for this one; else nothing."""
        known = self._known(kind, width)
        wanted = _name(kind, width)
        return "" if known == wanted else f"{wanted}: no speed of it is known; predicted at that of {known}"

    def _known(self, kind: str, width: int) -> str:
        for each in (width, 2) if width == 1 else (width,):  # without 8-bit floats it is a product in bf16
            for known in (kind, *LIKE.get(kind, ())):
                if (name := _name(known, each)) in self.curves:
                    return name
        raise KeyError(f"no speed is known for {kind} of {width} bytes an element")

    def seconds(self, op: Op) -> float:
        """Of all of its launches, without what it takes to start them."""
        streamed = op.nbytes / self.rate("stream" if op.flops else op.kind, op.nbytes / op.launches)
        streamed += op.launches * self.kernel_s
        if not op.flops:
            return streamed
        arithmetic = op.flops / self.rate(op.kind, op.size, op.width) + op.launches * self.product_s
        return max(arithmetic, streamed) if self.behind else arithmetic + streamed

    def passed(self, ops: Iterable[Op]) -> Passed:
        """How long operators take one after another."""
        compute = memory = start = 0.0
        for op in ops:
            seconds = self.seconds(op)
            if op.flops:
                compute += seconds
            else:
                memory += seconds
            start += op.launches * self.start_s[op.passed]
        return Passed(compute=compute, memory=memory, start=start, behind=self.behind)


def _name(kind: str, width: int) -> str:
    return f"{kind}/{PRECISIONS[width]}" if kind in ARITHMETIC else kind


LIKE = {
    "batched": ("product",),
    "attention": ("batched", "product"),
    "attention_backward": ("attention", "batched", "product"),
    f"{WHOLE}attention": ("attention", "batched", "product"),
    f"{WHOLE}attention_backward": ("attention_backward", "attention", "batched", "product"),
    "exp": ("stream",),
    "dequant": ("stream",),
    "adam": ("stream",),
    "adam8": ("adam", "stream"),
}


@dataclass(frozen=True, kw_only=True)
class Passed:
    """Seconds of a pass: arithmetic, memory, and what it takes to start the operators."""

    compute: float = 0.0
    memory: float = 0.0
    start: float = 0.0
    behind: bool = False

    @property
    def work(self) -> float:
        return self.compute + self.memory

    @property
    def idle(self) -> float:
        """While a device waits for its host."""
        return max(0.0, self.start - self.work) if self.behind else 0.0

    @property
    def total(self) -> float:
        return self.work + (self.idle if self.behind else self.start)

    def scaled(self, work: float, start: float) -> Passed:
        return Passed(
            compute=work * self.compute, memory=work * self.memory, start=start * self.start, behind=self.behind
        )


def at(curve: Curve, size: float) -> float:
    """The rate at a size."""
    place = bisect_right(curve, (size, math.inf))
    if place in (0, len(curve)):
        return curve[max(0, place - 1)][1]
    (low, slow), (high, fast) = curve[place - 1], curve[place]
    share = math.log(size / low) / math.log(high / low)
    return math.exp((1 - share) * math.log(slow) + share * math.log(fast))


def listed(device: Device) -> Speeds:
    """Of a GPU by its datasheet, what was measured of its generation, and the assumptions of this file."""
    curves: dict[str, Curve] = {}
    for precision, peak in ((name, device.tflops.get(name)) for name in PRECISIONS.values()):
        if peak is None:
            continue
        for kind, share in SHARES.items():
            rate = peak * 1e12 * device.reached(precision) * share
            curves[f"{kind}/{precision}"] = _flat(rate)
    memory = device.gb_per_s * 1e9
    curves |= dict.fromkeys(("stream", "exp", "adam", "adam8"), _flat(MEMORY * memory))
    curves["dequant"] = _flat(WIDENING * memory)
    return Speeds(curves=curves, start_s=START_S, behind=True, product_s=TAIL_S, kernel_s=KERNEL_S)


def _flat(rate: float) -> Curve:
    return ((1.0, rate),)
