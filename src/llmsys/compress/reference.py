"""Every method as its paper writes it: one process, all ranks' gradients at hand, one tensor after another.

The oracle of the tests. Nothing here is fast, packed or overlapped, and it shares with the methods only what makes
runs comparable: the generator of random numbers, the rules of `shapes` on what is compressed, and of Sign-SGD on ties.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from llmsys.compress.config import CompressConfig
from llmsys.compress.memory import generator
from llmsys.compress.methods.sparse import strata
from llmsys.cost import compressed as shapes

Grads = Mapping[str, Tensor]


class Reference:
    """`world` ranks. `errors[rank][name]`: what that rank has not sent yet."""

    def __init__(self, config: CompressConfig, world: int, *, global_feedback: bool = False) -> None:
        """`global_feedback`: E = C - mean approximation, as torch's hook has it, instead of the rank's own."""
        self.config, self.world, self.global_feedback = config, world, global_feedback
        self.errors: list[dict[str, Tensor]] = [{} for _ in range(world)]
        self.factors: dict[str, tuple[Tensor, Tensor]] = {}
        self.steps = 0

    def step(self, grads: Sequence[Grads]) -> dict[str, Tensor]:
        """The aggregate of `grads` (one mapping for each rank), by name."""
        assert len(grads) == self.world
        found = {name: self._one(name, [rank[name] for rank in grads]) for name in grads[0]}
        self.steps += 1
        return found

    def _one(self, name: str, grads: list[Tensor]) -> Tensor:
        method = self.config.method
        if method == "sign":
            return self._vote(grads)
        low_rank = shapes.low_rank(name, grads[0].shape, self.config)
        if method in ("fp16", "bf16"):
            half = torch.float16 if method == "fp16" else torch.bfloat16
            return sum((g / self.world).to(half).double() for g in grads).to(half).to(grads[0].dtype)  # type: ignore
        if method == "none" or self.config.skips(name) or (method in ("powersgd", "acpsgd") and not low_rank):
            return _mean(grads)
        corrected = [g + self._error(rank, name, g) for rank, g in enumerate(grads)]
        if method in ("topk", "randomk"):
            own = [self._chosen(name, c) for c in corrected]
        elif method == "efsign":
            own = [c.abs().mean() * torch.where(c >= 0, 1.0, -1.0).to(c) for c in corrected]
        else:
            own, mean = self._low_rank(name, corrected)
            self._keep(name, corrected, [mean] * self.world if self.global_feedback else own)
            return mean
        self._keep(name, corrected, own)
        return _mean(own)

    def _error(self, rank: int, name: str, like: Tensor) -> Tensor:
        return self.errors[rank].get(name, torch.zeros_like(like))

    def _keep(self, name: str, corrected: list[Tensor], sent: list[Tensor]) -> None:
        if self.config.feedback:
            for rank in range(self.world):
                self.errors[rank][name] = corrected[rank] - sent[rank]

    def _chosen(self, name: str, c: Tensor) -> Tensor:
        flat, sent = c.reshape(-1), torch.zeros(c.numel(), dtype=c.dtype)
        k = shapes.kept(c.numel(), self.config.density)
        if self.config.method == "topk":
            places = flat.abs().argsort(descending=True)[:k]
        else:
            places = strata(c.numel(), k, name, self.config.seed, self.steps)
        sent[places] = flat[places]
        return sent.view(c.shape)

    def _vote(self, grads: list[Tensor]) -> Tensor:
        """+1 or -1 by majority; where a gradient is 0 it votes + on even steps; a tie goes as rank `step mod world`."""
        zero = 1.0 if self.steps % 2 == 0 else -1.0
        votes = [torch.where(g == 0, torch.full_like(g, zero), g.sign()) for g in grads]
        total = torch.stack(votes).sum(0)
        return torch.where(total == 0, votes[self.steps % self.world], total.sign())

    def _low_rank(self, name: str, corrected: list[Tensor]) -> tuple[list[Tensor], Tensor]:
        """(each rank's own approximation, the mean's), with factors as columns as the papers have them."""
        shape = corrected[0].shape
        matrices = [c.reshape(shape[0], -1) for c in corrected]
        p, q = self._factors(name, matrices[0])
        r = min(self.config.r_at(self.steps), p.shape[1])
        every = self.config.refresh_every
        if every and self.steps and self.steps % every == 0:
            whole = _mean(matrices)
            fresh = torch.randn(r, q.shape[0], generator=generator(name, self.config.seed, self.steps)).to(q).T
            p[:, :r] = _orthonormal(whole @ fresh)
            q[:, :r] = whole.T @ p[:, :r]
            return corrected, whole.reshape(shape)
        if self.config.method == "powersgd":
            p[:, :r] = _orthonormal(_mean([m @ q[:, :r] for m in matrices]))
            own_q = [m.T @ p[:, :r] for m in matrices]
            q[:, :r] = _mean(own_q)
            own = [p[:, :r] @ each.T for each in own_q]
        elif self.steps % 2 == 0:
            if not self.config.reuse:
                q[:, :r] = torch.randn(r, len(q), generator=generator(name, self.config.seed, self.steps)).to(q).T
            q[:, :r] = _orthonormal(q[:, :r])
            own_p = [m @ q[:, :r] for m in matrices]
            p[:, :r] = _mean(own_p)
            own = [each @ q[:, :r].T for each in own_p]
        else:
            if not self.config.reuse:
                p[:, :r] = torch.randn(r, len(p), generator=generator(name, self.config.seed, self.steps)).to(p).T
            p[:, :r] = _orthonormal(p[:, :r])
            own_q = [m.T @ p[:, :r] for m in matrices]
            q[:, :r] = _mean(own_q)
            own = [p[:, :r] @ each.T for each in own_q]
        return [each.reshape(shape) for each in own], (p[:, :r] @ q[:, :r].T).reshape(shape)

    def _factors(self, name: str, like: Tensor) -> tuple[Tensor, Tensor]:
        if name not in self.factors:
            r = shapes.width(like.shape, self.config.widest)
            p, q = (
                torch.randn(r, size, generator=generator(f"{name}/{side}", self.config.seed)).to(like.dtype).T.clone()
                for side, size in zip("pq", like.shape, strict=True)
            )
            self.factors[name] = p, q
        return self.factors[name]


def _mean(tensors: Sequence[Tensor]) -> Tensor:
    return torch.stack(list(tensors)).mean(0)


def _orthonormal(columns: Tensor) -> Tensor:
    return torch.linalg.qr(columns).Q
