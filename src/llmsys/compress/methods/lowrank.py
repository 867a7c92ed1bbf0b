"""Power-SGD (Vogels et al., arXiv 1905.13727) and ACP-SGD (Zhang et al., arXiv 2306.08881): low-rank factors of a
gradient instead of it.

A gradient is a matrix G [N, M], E what was not sent of earlier ones, C = G + E; factors are rows, p [R, N], q [R, M]:

    Power-SGD, algorithm 1      p = mean of q C^T;  p orthonormal;  q = mean of p C;          G~ = p^T q
    ACP-SGD, even steps         q orthonormal;      p = mean of q C^T;                        G~ = p^T q
             odd steps          p orthonormal;      q = mean of p C;                          G~ = p^T q

so ACP-SGD takes half a power iteration a step, from the factor that the last step has received, and exchanges once.

E becomes C - p^T q with the rank's *own* p or q, before the mean of all is known. The average over the ranks is the
same as with the mean's, as C - p^T q is linear in C, p and q once the other factor is shared.

All that is done to a matrix before its factor travels is done at once, one matrix after another: then C comes from a
CPU's cache the second and third time, which saves it a quarter of the whole on matrices of 768 x 768. Factors are small
and made orthonormal all together before.

Everything that is not compressed travels in the same buffer.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor

from llmsys.compress.config import CompressConfig
from llmsys.compress.feedback import corrected, spend
from llmsys.compress.memory import generator
from llmsys.compress.methods.method import WAIT, AllReduce, Entry, Exchange, Part, Taken
from llmsys.compress.orthogonal import all_orthonormal_
from llmsys.compress.wire import Wire, copy, dtype_of, rounded
from llmsys.cost import compressed as shapes

P, Q = "p", "q"


@dataclass
class Matrix:
    """A gradient as a matrix, and its factors' first rows, as many as are in use at this step."""

    entry: Entry
    config: CompressConfig
    p: Tensor
    q: Tensor
    what: Tensor
    """E [N, M], from `correct` until `take` C; without error feedback the gradient itself."""

    @property
    def grad(self) -> Tensor:
        """[N, M], a view."""
        return self.entry.grad.view(self.entry.grad.shape[0], -1)

    def correct(self) -> None:
        self.what = corrected(self.entry, self.config).view(self.grad.shape)

    def take(self, p: Tensor, q: Tensor) -> Taken:
        """E -= p^T q, what this rank sends, where errors are kept."""
        if not self.config.feedback:
            return Taken(self.entry)
        self.add(p, q, -1)
        return Taken(self.entry, self.what, partial(self.give_back, p, q))

    def give_back(self, p: Tensor, q: Tensor, share: Tensor | float) -> None:
        """E += share p^T q."""
        self.add(p * share, q, 1)

    def clear(self) -> None:
        """E becomes 0: all of it was sent, but for what the wire rounds off."""
        self.what.sub_(rounded(self.what, self.config))

    def project(self, side: str, what: Tensor) -> Tensor:
        """A factor of `what` [N, M] by the other one: q what^T [R, N] for `p`, p what [R, M] for `q`."""
        what = what.to(self.p.dtype)  # itself, in full precision
        return torch.mm(self.q, what.t()) if side == P else torch.mm(self.p, what)

    def add(self, p: Tensor, q: Tensor, sign: int) -> None:
        """`what` += sign p^T q, in place."""
        if self.what.dtype == p.dtype:
            self.what.addmm_(p.t(), q, alpha=sign)
        else:
            self.what.add_(torch.mm(p.t(), q), alpha=sign)

    def write(self, p: Tensor, q: Tensor) -> None:
        """The gradient becomes p^T q, in place."""
        if self.grad.dtype == p.dtype:
            torch.mm(p.t(), q, out=self.grad)
        else:
            self.grad.copy_(torch.mm(p.t(), q))


class LowRank:
    """What both methods share."""

    linear = True
    rounds = 1

    def __init__(self, config: CompressConfig) -> None:
        self.config = config

    def split(self, part: Part) -> tuple[list[Matrix], list[Entry], list[Taken]]:
        """What travels as factors, what travels whole, and what is used up of memories."""
        r = self.config.r_at(part.step)
        matrices, rest = [], []
        for entry in part.entries:
            if shapes.low_rank(entry.name, entry.grad.shape, self.config):
                matrices.append(self._matrix(entry, r))
            else:
                rest.append(entry)
        return matrices, rest, spend(rest if self.config.feedback else part.entries)

    def _matrix(self, entry: Entry, r: int) -> Matrix:
        grad = entry.grad.view(entry.grad.shape[0], -1)
        p, q = _factors(entry, self.config)
        return Matrix(entry, self.config, p[:r], q[:r], grad)

    def dense(self, part: Part) -> Exchange:
        """A step on which everything travels whole, with all that error feedback has kept, and gives the subspace:
        one power iteration from a new random factor, on what all ranks have."""
        finite = part.guard()
        matrices, rest, taken = self.split(part)
        for x in matrices:
            x.correct()
        wire = Wire([*(x.what for x in matrices), *(entry.grad for entry in rest)], self.config, bool(matrices))
        wire.divide(part.world, finite)
        yield AllReduce(wire.buffer)
        yield WAIT
        arrived = wire.finite()
        # other buckets may not be finite, and the step left out: what is kept stays until that is known
        taken += [Taken(x.entry, x.what, commit=x.clear) for x in matrices] if self.config.feedback else []
        part.undo(arrived, taken)
        copy([*(x.grad for x in matrices), *(entry.grad for entry in rest)], wire.views)
        for x in matrices:
            x.q.copy_(_random(x, part.step, self.config))
            x.p.copy_(torch.where(arrived, x.project(P, x.grad), 0.0))
        all_orthonormal_([x.p for x in matrices])
        for x in matrices:
            x.q.copy_(torch.where(arrived, x.project(Q, x.grad), 0.0))
        return part.sent(arrived, taken)


class ACPSGD(LowRank):
    """One factor a step, the two in turn."""

    def exchange(self, part: Part) -> Exchange:
        if self.config.refreshes(part.step):
            return (yield from self.dense(part))
        finite = part.guard()
        matrices, rest, taken = self.split(part)
        side = P if part.step % 2 == 0 else Q
        own: list[Tensor] = []
        given = [x.q if side == P else x.p for x in matrices]
        if not self.config.reuse:
            for x, factor in zip(matrices, given, strict=True):
                factor.copy_(_random(x, part.step, self.config, factor))
        all_orthonormal_(given)
        for x in matrices:
            x.correct()
            mine = rounded(x.project(side, x.what), self.config)
            own.append(mine)
            taken.append(x.take(mine, x.q) if side == P else x.take(x.p, mine))
        wire = Wire([*own, *(entry.grad for entry in rest)], self.config, bool(matrices))
        wire.divide(part.world, finite)
        yield AllReduce(wire.buffer)
        yield WAIT
        arrived = wire.finite()
        part.undo(arrived, taken)
        for x, view in zip(matrices, wire.views, strict=False):
            mean = view.to(x.p.dtype)
            x.write(*((mean, x.q) if side == P else (x.p, mean)))
            received = x.p if side == P else x.q
            received.copy_(torch.where(arrived, mean, received))
        copy([entry.grad for entry in rest], wire.views[len(matrices) :])
        return part.sent(arrived, taken)


class PowerSGD(LowRank):
    """Both factors in every step, the second from the mean of the first. Whole tensors travel with the first."""

    rounds = 2

    def exchange(self, part: Part) -> Exchange:
        if self.config.refreshes(part.step):
            return (yield from self.dense(part))
        finite = part.guard()
        matrices, rest, taken = self.split(part)
        left = []
        for x in matrices:
            x.correct()
            left.append(x.project(P, x.what))
        first = Wire([*left, *(entry.grad for entry in rest)], self.config, bool(matrices))
        first.divide(part.world, finite)
        yield AllReduce(first.buffer)
        yield WAIT
        arrived = first.finite()
        copy([entry.grad for entry in rest], first.views[len(matrices) :])
        if not matrices:
            return part.sent(arrived, taken)
        own: list[Tensor] = []
        for x, view in zip(matrices, first.views, strict=False):
            x.p.copy_(torch.where(arrived, view, 0.0))
        all_orthonormal_([x.p for x in matrices])
        for x in matrices:
            own.append(rounded(x.project(Q, x.what), self.config))
            taken.append(x.take(x.p, own[-1]))
        second = Wire(own, self.config, True)
        second.divide(part.world, arrived)
        yield AllReduce(second.buffer)
        yield WAIT
        arrived = second.finite()
        part.undo(arrived, taken)
        for x, view in zip(matrices, second.views, strict=True):
            mean = view.to(x.q.dtype)
            x.write(x.p, mean)
            taken.append(Taken(x.entry, commit=partial(x.q.copy_, mean)))  # the next step starts from it
        return part.sent(arrived, taken)


def _factors(entry: Entry, config: CompressConfig) -> tuple[Tensor, Tensor]:
    """The parameter's factors, as wide as they will ever be; drawn at first use, alike on all ranks."""
    memory, grad = entry.memory, entry.grad
    r = shapes.width(grad.shape, config.widest)
    before = memory.p, memory.q
    if any(factor is None or len(factor) != r or factor.device != grad.device for factor in before):
        drawn = (
            torch.randn(r, size, generator=generator(f"{entry.name}/{side}", config.seed))
            for side, size in zip((P, Q), shapes.matrix(grad.shape), strict=True)
        )
        p, q = (factor.to(grad.device, dtype_of(grad)) for factor in drawn)
        for factor, old in zip((p, q), before, strict=True):
            if old is not None:  # from a file, and perhaps of another r
                factor[: len(old)] = old[:r]
        memory.p, memory.q = p, q
    assert memory.p is not None
    assert memory.q is not None
    return memory.p, memory.q


def _random(x: Matrix, step: int, config: CompressConfig, like: Tensor | None = None) -> Tensor:
    """A factor drawn anew for this step, of the shape of q or `like`."""
    like = x.q if like is None else like
    return torch.randn(like.shape, generator=generator(x.entry.name, config.seed, step)).to(like)
