"""Activations that keep their inputs alone, and compute the function and the gate's product again."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor
from torch.nn import functional as F

from llmsys.lorafa import kernels
from llmsys.lorafa.pieces.piece import Extra


def _silu(x: Tensor, dy: Tensor) -> Tensor:
    return torch.ops.aten.silu_backward(dy, x)  # type: ignore[no-any-return]


def _gelu(x: Tensor, dy: Tensor) -> Tensor:
    return torch.ops.aten.gelu_backward(dy, x)  # type: ignore[no-any-return]


def _gelu_tanh(x: Tensor, dy: Tensor) -> Tensor:
    return torch.ops.aten.gelu_backward(dy, x, approximate="tanh")  # type: ignore[no-any-return]


def _relu(x: Tensor, dy: Tensor) -> Tensor:
    return dy * (x > 0)


KINDS: dict[str, tuple[Callable[[Tensor], Tensor], Callable[[Tensor, Tensor], Tensor]]] = {
    "silu": (F.silu, _silu),
    "gelu": (F.gelu, _gelu),
    "gelu_tanh": (lambda x: F.gelu(x, approximate="tanh"), _gelu_tanh),
    "relu": (F.relu, _relu),
}
"""Name -> (f(x), (x, dy) -> dy f'(x))."""


class Activation:
    """y = f(g), or with a gate y = f(g) u: SwiGLU (arXiv 2002.05202) where f is silu.

    Backward: du = dy f(g), dg = dy u f'(g). Keeps: g, and u. Eager code keeps g twice over: f(g) for the product's
    derivative, and the product itself for the layer behind it.
    """

    def __init__(self, kind: str) -> None:
        self.kind = kind
        self.function, self.derivative = KINDS[kind]

    def trained(self) -> list[Tensor]:
        return []

    def forward(self, *inputs: Tensor) -> tuple[tuple[Tensor, ...], list[Extra]]:
        return self.again(inputs, []), []

    def again(self, inputs: Sequence[Tensor], extras: Sequence[Extra]) -> tuple[Tensor, ...]:
        gate, *up = inputs
        if up and kernels.serve(gate):
            return (kernels.gated(self.kind, gate, up[0]),)
        y = self.function(gate)
        return (y * up[0] if up else y,)

    def reads_inputs(self, wanted: bool) -> bool:
        return wanted

    def backward(
        self, inputs: Sequence[Tensor] | None, extras: Sequence[Extra], grads: Sequence[Tensor], wanted: bool
    ) -> tuple[tuple[Tensor | None, ...], list[Tensor | None]]:
        if not wanted:
            return (None,) * 2, []
        assert inputs is not None
        gate, *up = inputs
        (dy,) = grads
        if not up:
            return (self.derivative(gate, dy),), []
        if kernels.serve(gate):
            return kernels.gated_backward(self.kind, gate, up[0], dy), []
        return (self.derivative(gate, dy * up[0]), dy * self.function(gate)), []
