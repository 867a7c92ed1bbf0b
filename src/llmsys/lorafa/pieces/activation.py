"""Activations that keep their inputs alone, and compute the function and the gate's product again."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from llmsys.lorafa import kernels
from llmsys.lorafa.pieces.piece import Extra


def _silu(x: Tensor, dy: Tensor) -> Tensor:
    return torch.ops.aten.silu_backward(dy, x)


def _gelu(x: Tensor, dy: Tensor) -> Tensor:
    return torch.ops.aten.gelu_backward(dy, x)


def _gelu_tanh(x: Tensor, dy: Tensor) -> Tensor:
    return torch.ops.aten.gelu_backward(dy, x, approximate="tanh")


def _gelu_new(x: Tensor) -> Tensor:
    """`gelu_tanh` written out, as transformers' NewGELUActivation has it: other bits, the same function."""
    return 0.5 * x * (1.0 + torch.tanh(math.sqrt(2.0 / math.pi) * (x + 0.044715 * torch.pow(x, 3.0))))


def _relu(x: Tensor, dy: Tensor) -> Tensor:
    return torch.ops.aten.threshold_backward(dy, x, 0)


KINDS: dict[str, tuple[Callable[[Tensor], Tensor], Callable[[Tensor, Tensor], Tensor]]] = {
    "silu": (F.silu, _silu),
    "gelu": (F.gelu, _gelu),
    "gelu_tanh": (lambda x: F.gelu(x, approximate="tanh"), _gelu_tanh),
    "gelu_new": (_gelu_new, _gelu_tanh),
    "relu": (F.relu, _relu),
}
"""Name -> (f(x), (x, dy) -> dy f'(x))."""

CLASSES = {
    "SiLU": "silu",
    "SiLUActivation": "silu",
    "NewGELUActivation": "gelu_new",
    "ReLU": "relu",
}
"""Class of an activation in torch or transformers -> its name here."""


def kind(act: Any) -> str | None:
    """The name of what an activation module or function computes, to the bit; None where it is none of `KINDS`."""
    function = getattr(act, "act", act)  # where transformers' GELUs keep what they call
    if function is F.gelu or (isinstance(act, nn.GELU) and act.approximate == "none"):
        return "gelu"
    if isinstance(act, nn.GELU):
        return "gelu_tanh"
    if isinstance(function, functools.partial) and function.func is F.gelu:
        return "gelu_tanh" if function.keywords == {"approximate": "tanh"} else None
    return CLASSES.get(type(act).__name__)


def _derived(function: Callable[[Tensor], Tensor], x: Tensor, dy: Tensor) -> Tensor:
    """dy f'(x) of an elementwise function that none of `KINDS` is, by autograd."""
    with torch.enable_grad():
        own = x.detach().requires_grad_()
        return torch.autograd.grad(function(own), own, dy)[0]


class Activation:
    """y = f(g), or with a gate y = f(g) u: SwiGLU (arXiv 2002.05202) where f is silu.

    Backward: du = dy f(g), dg = dy u f'(g). Keeps: g, and u. Eager code keeps g twice over: f(g) for the product's
    derivative, and the product itself for the layer behind it.

    `act`: a name of `KINDS`, or a model's activation, any elementwise one. ValueError where that has trained weights.
    """

    def __init__(self, act: str | Callable[[Tensor], Tensor]) -> None:
        self.kind = act if isinstance(act, str) else kind(act)
        if self.kind is not None:
            self.function, self.derivative = KINDS[self.kind]
            return
        if isinstance(act, nn.Module) and any(weight.requires_grad for weight in act.parameters()):
            raise ValueError(f"the activation {type(act).__name__} has trained weights; adapters take it as frozen")
        assert not isinstance(act, str)
        self.function, self.derivative = act, functools.partial(_derived, act)

    def trained(self) -> list[Tensor]:
        return []

    def forward(self, *inputs: Tensor) -> tuple[tuple[Tensor, ...], list[Extra]]:
        return self.again(inputs, []), []

    def again(self, inputs: Sequence[Tensor], extras: Sequence[Extra]) -> tuple[Tensor, ...]:
        gate, *up = inputs
        if up and self.kind is not None and kernels.serve(gate):
            return (kernels.gated(self.kind, gate, up[0]),)
        return (self._times(gate, up[0]) if up else self.function(gate),)

    def _times(self, gate: Tensor, factor: Tensor) -> Tensor:
        y = self.function(gate)
        return y * factor if y is gate else y.mul_(factor)

    def reads_inputs(self, wanted: bool) -> bool:
        return wanted

    def backward(
        self, inputs: Sequence[Tensor] | None, extras: Sequence[Extra], grads: Sequence[Tensor], wanted: bool
    ) -> tuple[tuple[Tensor | None, ...], list[Tensor | None]]:
        if not wanted:
            return (None, None), []
        assert inputs is not None
        gate, *up = inputs
        (dy,) = grads
        if not up:
            return (self.derivative(gate, dy),), []
        if self.kind is not None and kernels.serve(gate):
            return kernels.gated_backward(self.kind, gate, up[0], dy), []
        return (self.derivative(gate, dy * up[0]), self._times(gate, dy)), []
