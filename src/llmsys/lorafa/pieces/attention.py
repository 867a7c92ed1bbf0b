"""The part of attention between its projections, computed again in the backward pass."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from llmsys.lorafa.pieces.dropout import draw_seed
from llmsys.lorafa.pieces.piece import Extra


class Core:
    """out = core(q, k, v, **held): rotation, scores, softmax, mixing, whatever the model's own code does there.

    Forward: `core` without autograd. Backward: `core` once more with autograd, and its derivative. Keeps: nothing but
    its inputs, which in a chain are computed again too (a fused kernel alone keeps q, k, v, the output and lse), and
    the tensors among `held`: masks and rotations, one storage for all blocks. Of those, what requires a gradient (a
    position bias that is trained) gets one.
    `random`: core draws random numbers (dropout on the probabilities); then it gets a seed of its own, to draw the
    same ones again.
    """

    def __init__(
        self,
        core: Callable[..., Tensor],
        device: torch.device,
        random: bool = False,
        held: Mapping[str, Any] | None = None,
    ) -> None:
        self.core, self.device, self.random = core, device, random
        kind = device.type
        self.autocast = (kind, torch.get_autocast_dtype(kind), torch.is_autocast_enabled(kind))
        held = held or {}
        self.names = [name for name, value in held.items() if isinstance(value, Tensor)]
        self.constants = {name: value for name, value in held.items() if name not in self.names}
        self.learnt = {name: held[name] for name in self.names if held[name].requires_grad}
        self._given: list[Tensor] = [held[name] for name in self.names]
        self._tape: tuple[list[Tensor], Tensor] | None = None

    def trained(self) -> list[Tensor]:
        return list(self.learnt.values())

    def forward(self, *inputs: Tensor) -> tuple[tuple[Tensor, ...], list[Extra]]:
        extras: list[Extra] = [draw_seed()] if self.random else []
        extras += self._given
        self._given = []  # from here on they are extras, which saved-tensor hooks see, and no attributes
        held = self._held(extras)
        with self._repeatable(extras):
            return (self.core(*inputs, **held),), extras

    def _held(self, extras: Sequence[Extra]) -> dict[str, Any]:
        return {**self.constants, **dict(zip(self.names, extras[int(self.random) :], strict=True))}

    @contextlib.contextmanager
    def _repeatable(self, extras: Sequence[Extra]) -> Iterator[None]:
        """The forward pass's autocast, and its random numbers."""
        kind, dtype, enabled = self.autocast
        devices = [self.device] if kind == "cuda" else []
        with torch.random.fork_rng(devices, enabled=self.random), torch.autocast(kind, dtype, enabled):
            if self.random:  # not torch.manual_seed, which seeds every other device too
                torch.default_generator.manual_seed(int(extras[0]))
            if self.random and kind == "cuda":
                index = torch.cuda.current_device() if self.device.index is None else self.device.index
                torch.cuda.default_generators[index].manual_seed(int(extras[0]))
            yield

    def again(self, inputs: Sequence[Tensor], extras: Sequence[Extra]) -> tuple[Tensor, ...]:
        """Who computes this again needs it for a later piece, and will come back for the derivative: so with autograd,
        once for both."""
        self._tape = self._taped(inputs, extras)
        return (self._tape[1].detach(),)

    def _taped(self, inputs: Sequence[Tensor], extras: Sequence[Extra]) -> tuple[list[Tensor], Tensor]:
        with torch.enable_grad(), self._repeatable(extras):
            own = [x.detach().requires_grad_() for x in inputs]
            held = self._held(extras)
            learnt = {name: held[name].detach().requires_grad_() for name in self.learnt}
            return [*own, *learnt.values()], self.core(*own, **{**held, **learnt})

    def reads_inputs(self, wanted: bool) -> bool:
        return wanted or bool(self.learnt)

    def backward(
        self, inputs: Sequence[Tensor] | None, extras: Sequence[Extra], grads: Sequence[Tensor], wanted: bool
    ) -> tuple[tuple[Tensor | None, ...], list[Tensor | None]]:
        tape, self._tape = self._tape, None
        if not self.reads_inputs(wanted):
            return (None,), []
        assert inputs is not None
        own, out = tape or self._taped(inputs, extras)
        found = torch.autograd.grad(out, own, grads[0])
        return found[: len(inputs)], list(found[len(inputs) :])
