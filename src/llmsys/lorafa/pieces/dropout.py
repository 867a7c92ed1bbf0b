"""Dropout whose mask is drawn again in the backward pass from a seed: exact, and nothing is kept but the number."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from llmsys.lorafa import kernels
from llmsys.lorafa.pieces.piece import Extra


def draw_seed() -> int:
    """A fresh seed from torch's default stream, so that a run's seed and its checkpoints cover dropout too."""
    return int(torch.randint(2**62, ()))


def dropped(x: Tensor, p: float, seed: int) -> Tensor:
    """x times a mask of zeros (with probability p) and 1 / (1 - p); the same for the same seed, shape, device and kind
    of kernel (`llmsys.lorafa.kernels`).
    """
    if kernels.serve(x):
        return kernels.dropped(x, p, seed)
    mask, factor = kept(x, p, seed)
    return mask.mul_(x).mul_(factor)


def kept(x: Tensor, p: float, seed: int) -> tuple[Tensor, float]:
    """The mask of zeros and ones in the shape and dtype of x, and the factor for what it keeps.

    An element is kept where 16 random bits are at least p 2**16, so p is rounded to a multiple of 2**-16, the factor
    too. Four elements share a draw of 64 bits: on a CPU that takes a sixth of the time of torch's draw for each, so
    that drawing twice costs less than torch's once.
    """
    generator = torch.Generator(x.device).manual_seed(seed)
    threshold = min(round(p * 2**16), 2**16 - 1)
    n = x.numel()
    draws = torch.empty((n + 3) // 4, dtype=torch.int64, device=x.device).random_(-(2**63), None, generator=generator)
    mask = (draws.view(torch.int16)[:n] >= threshold - 2**15).view(x.shape)
    return mask.to(x.dtype), 1 / (1 - threshold * 2**-16)  # as numbers: times a boolean takes a CPU four times as long


def thinned(x: Tensor, mask: Tensor, factor: float) -> Tensor:
    """x in place, times what `kept` returned."""
    return x.mul_(mask).mul_(factor)


class Dropout:
    """Forward: y = m x / (1 - p). Backward: dx = m dy / (1 - p). Keeps: the seed of m, a number; 0 bytes.

    torch's own keeps m: a byte an element on CUDA, an element's own width on a CPU.
    """

    def __init__(self, p: float, training: bool = True) -> None:
        self.p = p if training else 0.0

    def trained(self) -> list[Tensor]:
        return []

    def forward(self, *inputs: Tensor) -> tuple[tuple[Tensor, ...], list[Extra]]:
        if not self.p:
            return inputs, []
        seed = draw_seed()
        return (dropped(inputs[0], self.p, seed),), [seed]

    def again(self, inputs: Sequence[Tensor], extras: Sequence[Extra]) -> tuple[Tensor, ...]:
        return (self._apply(inputs[0], extras),)

    def _apply(self, x: Tensor, extras: Sequence[Extra]) -> Tensor:
        return dropped(x, self.p, int(extras[0])) if self.p else x

    def reads_inputs(self, wanted: bool) -> bool:
        return False

    def backward(
        self, inputs: Sequence[Tensor] | None, extras: Sequence[Extra], grads: Sequence[Tensor], wanted: bool
    ) -> tuple[tuple[Tensor | None, ...], list[Tensor | None]]:
        return (self._apply(grads[0], extras) if wanted else None,), []
