"""How the down-projection A [R, N] is drawn: once, since it never moves.

    gaussian      independent normal entries: the paper's
    orthonormal   the same, orthonormalised (QR): directions without overlap, so that the paper's closed-form correction
                  (A A^T)^-1 is a scalar, which AdamW cannot see
    select        rows of the identity: z is r of the N inputs (PaCA, arXiv 2503.01905)
    weight_svd    the right singular vectors of W with the largest values (PiSSA's, arXiv 2404.02948)
    pca           the principal directions of the layer's inputs on some batches (EVA, arXiv 2410.07170)

Scale: A A^T is I / 3 exactly, or (gaussian) on average, since that is what LoRA's usual start has, kaiming_uniform with
a = sqrt(5): entries of variance 1 / (3 N). Under Adam a step moves W by lr s |A|, so learning rates found for one init
hold for the others.

Entries are rounded to bf16. So one matrix serves models in fp32 and bf16, and a seed gives the same matrix on every
machine: integers are drawn, what is made of them in fp64 differs by 1e-15 between libraries, and bf16 sees none of it.
"""

from __future__ import annotations

import functools
import hashlib
from collections.abc import Callable

import torch
from torch import Tensor

VARIANCE = 1 / 3
"""Of the rows: A A^T = I / 3."""


def draw(init: str, r: int, n: int, seed: int, name: str, epoch: int = 0) -> Tensor:
    """A seeded A [r, n], fp32 on the host with entries that bf16 has; `name` tells a model's layers apart, and `epoch`
    the draws of one layer (see `refreshing`)."""
    key = hashlib.sha256((f"{seed}/{name}#{epoch}" if epoch else f"{seed}/{name}").encode()).digest()
    generator = torch.Generator().manual_seed(int.from_bytes(key[:7], "big"))
    return rounded(_DRAWS[init](r, n, generator))


def rounded(directions: Tensor) -> Tensor:
    """Directions of norm 1 [R, N] as an A: scaled, with entries that bf16 has."""
    return (directions * VARIANCE**0.5).to(torch.bfloat16).float()


def orthonormal(rows: Tensor) -> Tensor:
    """An orthonormal basis [R, N] of the span of `rows` [R, N], in fp64; signs as in a positive diagonal of R."""
    q, triangle = torch.linalg.qr(rows.double().T)
    return (q * triangle.diagonal().sign()).T.contiguous()


def _normal(r: int, n: int, generator: torch.Generator) -> Tensor:
    """Standard normal entries, fp64, from uniform integers: torch's own normal draws differ between processors."""
    steps = 2**52
    uniform = (torch.randint(steps, (r, n), generator=generator).double() + 0.5) / steps
    return torch.erfinv(2 * uniform - 1) * 2**0.5


def _gaussian(r: int, n: int, generator: torch.Generator) -> Tensor:
    return _normal(r, n, generator) / n**0.5


def _orthonormal(r: int, n: int, generator: torch.Generator) -> Tensor:
    return orthonormal(_normal(r, n, generator))


def _select(r: int, n: int, generator: torch.Generator) -> Tensor:
    chosen = _normal(1, n, generator)[0].argsort()[:r].sort().values
    return torch.nn.functional.one_hot(chosen, n).double()


_DRAWS: dict[str, Callable[[int, int, torch.Generator], Tensor]] = {
    "gaussian": _gaussian,
    "orthonormal": _orthonormal,
    "select": _select,
}


def weight_svd(weight: Tensor, r: int, seed: int) -> Tensor:
    """A of the r largest right singular vectors of `weight` [M, N]; randomised (Halko et al., arXiv 0909.4061)."""
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(seed)  # torch.manual_seed seeds every GPU's too, and these are not forked
        _, _, v = torch.svd_lowrank(weight.detach().float().cpu(), q=min(r + 8, *weight.shape), niter=4)
    return rounded(orthonormal(v.T[:r]))


class Covariance:
    """The largest directions of a layer's inputs, seen batch by batch: X^T X is multiplied by a thin random matrix and
    orthonormalised, which is one step of subspace iteration; [N, R + 8] numbers instead of [N, N]."""

    def __init__(self, r: int, n: int, seed: int) -> None:
        self.r = r
        self.probe = _normal(n, min(r + 8, n), torch.Generator().manual_seed(seed)).float()
        self.product = torch.zeros_like(self.probe)

    def add(self, x: Tensor) -> None:
        """Inputs [..., N]."""
        rows = x.detach().flatten(0, -2).float()
        probe = self.probe.to(rows.device)
        self.product += (rows.T @ (rows @ probe)).cpu()

    def a(self) -> Tensor:
        """A [R, N]; ValueError where no input was seen."""
        if not self.product.any():
            raise ValueError("init=pca: the batches never reach this layer")
        left, _, _ = torch.linalg.svd(self.product.double(), full_matrices=False)
        return rounded(orthonormal(left[:, : self.r].T))


def fingerprint(a: Tensor) -> str:
    """SHA-256 of A's entries: in bf16, where that has them all, so the same in whatever dtype A is held; else in fp32.

    fp16 lacks the smallest of bf16's: there a matrix has a fingerprint of its own.
    """
    wide = a.detach().to("cpu", torch.float32)
    half = wide.to(torch.bfloat16)
    bits = half.view(torch.int16) if torch.equal(half.float(), wide) else wide.view(torch.int32)
    return hashlib.sha256(f"{tuple(a.shape)}".encode() + bits.contiguous().numpy().tobytes()).hexdigest()


@functools.lru_cache(maxsize=65536)
def recipe(init: str, r: int, n: int, seed: int, name: str, epoch: int) -> str:
    """The fingerprint of a draw; of one drawn before, without drawing again."""
    return fingerprint(draw(init, r, n, seed, name, epoch))
