"""A paper's model by its parameters' shapes, whose passes take the time they would take on a device not at hand.

Gradients are there, synthetic, in the order and at the times at which the device would have them; nothing is computed.
What the ranks do with them (buckets, compression, collectives) is real. A pass has a time for each parameter, from its
FLOPs. What a hook and its callbacks have taken so far is the device's time too, so the rest of the pass is that much
later, as it is on a device; of S-SGD, which has no hook, nothing is known and its division of each bucket is free.

Gradients are drawn in the first two steps, on each rank others; later a gradient is what the step before has made of
it. The backward pass says of each that it is there without touching it, since a device, which has its own memory, would
take nothing of the ranks' for it.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from llmsys.compress.paper_models import Parameter

DRAWN_STEPS = 2
"""DDP makes its buckets anew in the second; from then on gradients are views into them."""


class Pace:
    """The device's clock: it stands still while `excluded()` seconds pass, of work that is not the pass's own."""

    def __init__(self, excluded: Callable[[], float]) -> None:
        self._excluded = excluded
        self._due = 0.0

    def _now(self) -> float:
        return time.perf_counter() - self._excluded()

    def begin(self) -> None:
        self._due = self._now()

    def take(self, seconds: float) -> None:
        """Waits until the device would have done what takes so long. Waiting too long is made up for by the next."""
        self._due += seconds
        left = self._due - self._now()
        if left > 0:
            time.sleep(left)


class PacedModel(nn.Module):
    """Parameters of the shapes of `parameters`, on `device`. `flops_per_s` None: passes take no time."""

    def __init__(
        self, parameters: Sequence[Parameter], batch: int, flops_per_s: float | None, device: torch.device, seed: int
    ) -> None:
        super().__init__()
        self.excluded: Callable[[], float] = lambda: 0.0
        """Seconds that hooks have taken in this step; whoever attaches them says how many."""
        self.names = [p.name.replace(".", "/") for p in parameters]
        for name, p in zip(self.names, parameters, strict=True):
            # never read nor written, so that the host has no memory behind them
            self.register_parameter(name, nn.Parameter(torch.empty(p.shape, device=device)))
        self.seconds = [batch * p.flops / flops_per_s if flops_per_s else 0.0 for p in parameters]
        """Of the forward pass, by parameter; the backward pass takes twice as long."""
        self.pace = Pace(lambda: self.excluded())
        self.step = 0
        self._draw = torch.Generator(device=device).manual_seed(seed)

    def forward(self, token: Tensor) -> Tensor:
        """A scalar whose backward pass goes through all parameters, in reverse."""
        self.pace.begin()
        self.pace.take(sum(self.seconds))
        self.step += 1
        for i, name in enumerate(self.names):
            token = _Layer.apply(token, self.get_parameter(name), self, i)
        return token

    def gradient(self, index: int) -> Tensor | None:
        """When the pass has reached that parameter: its gradient, None where it is there already."""
        self.pace.take(2 * self.seconds[index])
        parameter = self.get_parameter(self.names[index])
        if self.step > DRAWN_STEPS:
            return None
        return torch.randn(parameter.shape, generator=self._draw, device=parameter.device)


class _Layer(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, token: Tensor, parameter: Tensor, model: PacedModel, index: int) -> Tensor:
        ctx.model, ctx.index = model, index
        return token.clone()

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        return grads[0], ctx.model.gradient(ctx.index), None, None
