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
    """x times a mask of zeros (with probability p) and 1 / (1 - p); the same for the same seed, shape, device
    and kind of kernel (`llmsys.lorafa.kernels`)."""
    if kernels.serve(x):
        return kernels.dropped(x, p, seed)
    generator = torch.Generator(x.device).manual_seed(seed)
    mask = torch.empty(x.shape, dtype=torch.bool, device=x.device).bernoulli_(1 - p, generator=generator)
    return (x * mask).mul_(1 / (1 - p))


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
