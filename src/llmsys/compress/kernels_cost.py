"""How long a GPU compresses and decompresses a bucket: FLOPs, passes over memory, and the number of kernels.

A kernel takes the longest of its arithmetic, its memory traffic and the least that any kernel takes. Those counted are
the methods' own (`methods/`), of fp32 gradients; bytes of a bucket of d elements, of one of its tensors of n elements:

    guard        sum 4 d, masked fill 8 d
    none         division 8 d; fp16 and bf16: also copies there and back, 6 d each
    correct      E += G, 12 n
    pack         comparison 5 n, words 2 n and 2 n, bytes 9/8 n
    add signs    table 9/8 n and 5 n, sum 12 n
    sign         guard, pack | for each of 8 bits 10 kernels on the votes, 5 d / 8 and more | zeros 4 d, add signs
    efsign       guard, correct, norm 4 n, pack; add signs to E | zeros 4 d, add signs of each rank
    topk         guard, correct, magnitudes 8 n, radix selection 5 x 4 n | zeros 4 d, a sum for each tensor and rank
    randomk      guard, correct, k elements | zeros 4 n, k elements
    powersgd     guard, correct, q C^T | QR of p, p C, E -= p^T q | p^T q
    acpsgd       guard, correct, QR of the given factor, a product, E -= p^T q | p^T q

Each product with a factor of r rows is 2 N M r FLOPs and passes over the matrix once (E twice). QR is Householder's, of
2 r kernels, since one column's reflection needs the last one's: r make them, r more make Q; each 2 N r FLOPs and 8 N r
bytes. Left out: that signs are packed, and magnitudes taken, in pieces, which makes more kernels of the same bytes.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from llmsys.cost import compressed
from llmsys.cost.compressed import Named
from llmsys.schema.compress import LOW_RANK, Settings


@dataclass(frozen=True, kw_only=True)
class Rates:
    """What a device achieves: FLOPs and bytes of memory a second; `launch_s`: the least that a kernel takes."""

    flops_per_s: float
    bytes_per_s: float
    launch_s: float

    def kernel(self, nbytes: float, flops: float = 0.0) -> float:
        """Seconds of one."""
        return max(self.launch_s, flops / self.flops_per_s, nbytes / self.bytes_per_s)

    def kernels(self, *nbytes: float) -> float:
        """Seconds of several, one after another."""
        return sum(self.kernel(each) for each in nbytes)

    def qr(self, rows: int, r: int) -> float:
        """Seconds of the QR of a factor of r columns [rows, r]."""
        return 2 * r * self.kernel(8.0 * rows * r, 2.0 * rows * r)


@dataclass(frozen=True, kw_only=True)
class Work:
    """Seconds of the device. `before`: of each round, to make its message; `during`: while the last round's is on the
    wire; `after`: when it has arrived."""

    before: tuple[float, ...]
    during: float = 0.0
    after: float = 0.0


def work(gradients: Sequence[Named], config: Settings, rates: Rates, world: int, step: int) -> Work:
    """To exchange a bucket of fp32 gradients at `step` (from 0) among `world` ranks. Nothing may be excepted (`skip`)
    and no step refreshed: their cost is not known here."""
    assert not config.skip, "no cost is known for skip"
    assert not config.refresh_every, "no cost is known for refresh_every"
    method, sizes = config.method, [math.prod(shape) for _, shape, _ in gradients]
    d = sum(sizes)
    if method in ("none", "fp16", "bf16"):
        copy = 0.0 if method == "none" else rates.kernel(6.0 * d)
        return Work(before=(rates.kernel(8.0 * d) + copy,), after=copy)
    if method in LOW_RANK:
        return _low_rank(gradients, config, rates, step)
    guard = _guard(rates, d)
    if method == "sign":
        return Work(
            before=(guard + _pack(rates, d), _majority(rates, d, world)),
            after=rates.kernel(4.0 * d) + _add_signs(rates, d),
        )
    before = guard + sum(_correct(rates, n, config) for n in sizes)
    # a kernel on what is sent of each tensor: values and places, read and written
    few = sum(rates.kernel(16.0 * compressed.kept(n, config.density)) for n in sizes)
    if method == "efsign":
        signs = sum(_add_signs(rates, n) for n in sizes)
        before += sum(rates.kernel(4.0 * n) + _pack(rates, n) for n in sizes)
        return Work(before=(before,), during=signs * config.feedback, after=rates.kernel(4.0 * d) + world * signs)
    if method == "topk":
        before += sum(rates.kernel(8.0 * n) + 5 * rates.kernel(4.0 * n) for n in sizes) + few
        after = rates.kernels(4.0 * d, 8.0 * d) + world * few
        return Work(before=(before,), during=few * config.feedback, after=after)
    assert method == "randomk", f"no cost is known for {method}"
    after = sum(rates.kernel(4.0 * n) for n in sizes) + few + rates.kernel(8.0 * d)
    return Work(before=(before + few,), during=few * config.feedback, after=after)


def _guard(rates: Rates, d: int) -> float:
    return rates.kernels(4.0 * d, 8.0 * d)


def _correct(rates: Rates, n: int, config: Settings) -> float:
    return rates.kernel(12.0 * n) if config.feedback else 0.0


def _pack(rates: Rates, n: int) -> float:
    return rates.kernels(5.0 * n, 2.0 * n, 2.0 * n, 9 / 8 * n)


def _add_signs(rates: Rates, n: int) -> float:
    return rates.kernels(9 / 8 * n, 5.0 * n, 12.0 * n)


def _majority(rates: Rates, d: int, world: int) -> float:
    """Votes are uint8 [world, d / 8 / world]; their sums int32, of a rank's share."""
    votes, share = d / 8, d / 8 / world
    return 8 * (rates.kernels(2 * votes, 2 * votes, votes + 4 * share) + 7 * rates.kernel(8 * share))


def _low_rank(gradients: Sequence[Named], config: Settings, rates: Rates, step: int) -> Work:
    power = config.method == "powersgd"
    d = sum(math.prod(shape) for _, shape, _ in gradients)
    whole, first, second = 0, 0, 0  # elements that travel whole, and in factors, in each round
    before, between, after = _guard(rates, d), 0.0, 0.0
    for name, shape, _ in gradients:
        if not compressed.low_rank(name, shape, config):
            whole += math.prod(shape)
            continue
        (n, m), r = compressed.matrix(shape), compressed.width(shape, config.r_at(step))
        flops, factors = 2.0 * n * m * r, 4.0 * (n + m) * r
        product = rates.kernel(4.0 * n * m + factors, flops)
        taken = rates.kernel(8.0 * n * m + factors, flops) * config.feedback
        before += _correct(rates, n * m, config) + product
        if power:
            between += rates.qr(n, r) + product + taken
        else:
            before += rates.qr(n if step % 2 else m, r) + taken
        first += (n if power or step % 2 == 0 else m) * r
        second += m * r * power
        after += product + rates.kernel(8.0 * max(n, m) * r)
    rest = rates.kernel(8.0 * whole) if whole else 0.0
    before += _wire(rates, first + whole)
    if not second:
        return Work(before=(before,), after=after + rest)
    return Work(before=(before, rest + between + _wire(rates, second)), after=after)


def _wire(rates: Rates, elements: int) -> float:
    """Copies into one buffer, divides it, and looks at the sum of what has arrived."""
    return rates.kernels(8.0 * elements, 8.0 * elements, 4.0 * elements)
