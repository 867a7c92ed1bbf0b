"""The part of attention between its projections, computed again in the backward pass."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from llmsys.lorafa.pieces.dropout import draw_seed
from llmsys.lorafa.pieces.piece import Extra


class Core:
    """out = core(q, k, v): rotation, scores, softmax, mixing, whatever the model's own code does there.

    Forward: `core` without autograd. Backward: `core` once more with autograd, and its derivative. Keeps: nothing but
    its inputs, which in a chain are computed again too; a fused kernel alone keeps q, k, v, the output and lse.
    `random`: core draws random numbers (dropout on the probabilities); then it gets a seed of its own, to draw the
    same ones again.
    """

    def __init__(self, core: Callable[..., Tensor], device: torch.device, random: bool = False) -> None:
        self.core, self.device, self.random = core, device, random
        kind = device.type
        self.autocast = (kind, torch.get_autocast_dtype(kind), torch.is_autocast_enabled(kind))

    def trained(self) -> list[Tensor]:
        return []

    def forward(self, *inputs: Tensor) -> tuple[tuple[Tensor, ...], list[Extra]]:
        extras: list[Extra] = [draw_seed()] if self.random else []
        return self.again(inputs, extras), extras

    def again(self, inputs: Sequence[Tensor], extras: Sequence[Extra]) -> tuple[Tensor, ...]:
        kind, dtype, enabled = self.autocast
        devices = [self.device] if kind == "cuda" else []
        with torch.random.fork_rng(devices, enabled=self.random), torch.autocast(kind, dtype, enabled):
            if self.random:
                torch.manual_seed(int(extras[0]))
            return (self.core(*inputs),)

    def reads_inputs(self, wanted: bool) -> bool:
        return wanted

    def backward(
        self, inputs: Sequence[Tensor] | None, extras: Sequence[Extra], grads: Sequence[Tensor], wanted: bool
    ) -> tuple[tuple[Tensor | None, ...], list[Tensor | None]]:
        if not wanted:
            return (None,) * 3, []
        assert inputs is not None
        with torch.enable_grad():
            own = [x.detach().requires_grad_() for x in inputs]
            (out,) = self.again(own, extras)
        return torch.autograd.grad(out, own, grads[0]), []
