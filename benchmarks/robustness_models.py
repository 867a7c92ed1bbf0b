"""What the subjects of `compress_robustness.py` train: `Net` learns; `Given` has whatever gradients it is told to, so
that their true mean is known.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from robustness_subjects import Loss

SHAPES = ((24, 32), (32, 32), (32, 12), (32,))
"""Of `Given`: matrices that all subjects compress at r = 2, and a vector."""


class Net(nn.Module):
    """Three layers that learn."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.body = nn.Sequential(nn.Linear(24, 32), nn.Tanh(), nn.Linear(32, 32), nn.Tanh(), nn.Linear(32, 12))

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.body(x)
        return out


class Given(nn.Module):
    """Its gradients are its input."""

    def __init__(self, shapes: Sequence[tuple[int, ...]] = SHAPES) -> None:
        super().__init__()
        self.weights = nn.ParameterList(torch.zeros(shape) for shape in shapes)

    def forward(self, *grads: Tensor) -> Tensor:
        return torch.stack([(p * g).sum() for p, g in zip(self.weights, grads, strict=True)]).sum()


def batch(rank: int, step: int, part: int = 0) -> Tensor:
    return torch.randn(6, 24, generator=torch.Generator().manual_seed(10_000 * rank + 10 * step + part))


def distance(x: Tensor, factor: float = 1.0) -> Loss:
    """What `Net` is to make small, of a batch, times `factor`."""

    def loss(model: nn.Module) -> Tensor:
        found: Tensor = (model(x) - 0.5).square().mean() * factor
        return found

    return loss


def gradients(rank: int, step: int, shapes: Sequence[tuple[int, ...]] = SHAPES) -> list[Tensor]:
    """Of matrices a part of rank 2, alike at all steps and ranks, and a tenth of noise."""
    shared, own = torch.Generator().manual_seed(1), torch.Generator().manual_seed(1000 * step + rank + 2)
    found = []
    for shape in shapes:
        noise = 0.1 * torch.randn(shape, generator=own)
        if len(shape) == 2:
            sides = [torch.randn(n, 2, generator=shared) for n in shape]
            noise += sides[0] @ sides[1].T
        found.append(noise)
    return found


def mean(world: int, step: int, shapes: Sequence[tuple[int, ...]] = SHAPES) -> list[Tensor]:
    ranks = [gradients(rank, step, shapes) for rank in range(world)]
    return [torch.stack(each).mean(0) for each in zip(*ranks, strict=True)]
