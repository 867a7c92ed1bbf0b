"""Norms that keep their input in the dtype it has, and one or two numbers a row. T tokens, D model width."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from llmsys.lorafa import kernels
from llmsys.lorafa.pieces.piece import Extra


class RMSNorm:
    """Root mean square norm (arXiv 1910.07467), rounded where transformers' LLaMA rounds it.

    Forward: x^ = x rstd, rstd = (mean(x^2) + eps)^-1/2 in fp32; y = w x^. Backward, with g = w dy:
    dx = rstd (g - x^ mean(g x^)), dw = sum over T of dy x^. Keeps: x (where dx or dw is wanted) and rstd [T, 1] in
    fp32. Eager code keeps an fp32 copy of x, twice the bytes of a bf16 x.
    """

    def __init__(self, module: Any) -> None:
        self.module = module

    def trained(self) -> list[Tensor]:
        return [self.module.weight] if self.module.weight.requires_grad else []

    def read(self) -> list[Tensor]:
        return [self.module.weight]

    def forward(self, *inputs: Tensor) -> tuple[tuple[Tensor, ...], list[Extra]]:
        (x,) = inputs
        if kernels.serve(x):
            y, rstd = kernels.rms_norm(x, self.module.weight, self.module.variance_epsilon, self.rounded(x))
            return (y,), [rstd]
        wide = x.to(_wide(x))
        rstd = torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + self.module.variance_epsilon)
        return (self._scaled(x, rstd),), [rstd]

    def again(self, inputs: Sequence[Tensor], extras: Sequence[Extra]) -> tuple[Tensor, ...]:
        if kernels.serve(inputs[0]):
            rounded = self.rounded(inputs[0])
            return (kernels.rms_norm_again(inputs[0], extras[0], self.module.weight, rounded),)
        return (self._scaled(inputs[0], extras[0]),)

    def _scaled(self, x: Tensor, rstd: Extra) -> Tensor:
        normed, weight = (x.to(_wide(x)) * rstd).to(self.rounded(x)), self.module.weight
        if torch.promote_types(normed.dtype, weight.dtype) == normed.dtype:
            return normed.mul_(weight)
        scaled: Tensor = weight * normed
        return scaled

    def rounded(self, x: Tensor) -> torch.dtype:
        """The dtype that x^ is rounded to before it is scaled."""
        return x.dtype

    def reads_inputs(self, wanted: bool) -> bool:
        return wanted or bool(self.trained())

    def backward(
        self, inputs: Sequence[Tensor] | None, extras: Sequence[Extra], grads: Sequence[Tensor], wanted: bool
    ) -> tuple[tuple[Tensor | None, ...], list[Tensor | None]]:
        if not self.reads_inputs(wanted):
            return (None,), []
        assert inputs is not None
        (x,), (dy,), rstd = inputs, grads, extras[0]
        if kernels.serve(x):
            asked = {"dx": wanted, "dw": bool(self.trained())}
            dx, gradient = kernels.rms_norm_backward(x, rstd, self.module.weight, dy, self.rounded(x), **asked)
            return (dx,), [gradient] * asked["dw"]
        normed = x.to(_wide(x)) * rstd
        dw: list[Tensor | None] = [_rows(dy * normed.to(self.rounded(x))).to(w.dtype) for w in self.trained()]
        if not wanted:
            return (None,), dw
        g = (dy * self.module.weight).to(normed.dtype)
        mean = (g * normed).mean(-1, keepdim=True)
        return (g.addcmul_(normed, mean, value=-1).mul_(rstd).to(x.dtype),), dw


class T5Norm(RMSNorm):
    """The same, rounded where transformers' T5 rounds it: to the dtype of a half-precision weight, and else not."""

    def rounded(self, x: Tensor) -> torch.dtype:
        dtype: torch.dtype = self.module.weight.dtype
        return dtype if dtype in (torch.bfloat16, torch.float16) else _wide(x)

    def dtype(self, x: Tensor) -> torch.dtype:
        """The output's."""
        return torch.promote_types(self.rounded(x), self.module.weight.dtype)


class LayerNorm:
    """Layer norm (arXiv 1607.06450) by torch's own kernels; under autocast in fp32, as autocast has it.

    Forward: x^ = (x - mean) rstd; y = w x^ + b. Backward, with g = w dy: dx = rstd (g - mean(g) - x^ mean(g x^)),
    dw = sum of dy x^, db = sum of dy over T. Keeps: x (where a gradient but db is wanted), mean and rstd [T, 1] each.
    """

    def __init__(self, module: nn.Module) -> None:
        self.module: Any = module
        kind = str(self.module.weight.device.type)
        self.autocast = torch.is_autocast_enabled(kind)

    def trained(self) -> list[Tensor]:
        return [p for p in self.read() if p.requires_grad]

    def read(self) -> list[Tensor]:
        return [p for p in (self.module.weight, self.module.bias) if p is not None]

    def forward(self, *inputs: Tensor) -> tuple[tuple[Tensor, ...], list[Extra]]:
        y, mean, rstd = self._norm(inputs[0])
        return (y,), [mean, rstd]

    def _norm(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        module = self.module
        found: tuple[Tensor, Tensor, Tensor] = torch.native_layer_norm(
            self._cast(x), module.normalized_shape, self._cast(module.weight), self._cast(module.bias), module.eps
        )
        return found

    def _cast(self, x: Any) -> Any:
        return x.float() if self.autocast and x is not None else x

    def again(self, inputs: Sequence[Tensor], extras: Sequence[Extra]) -> tuple[Tensor, ...]:
        return (self._norm(inputs[0])[0],)

    def reads_inputs(self, wanted: bool) -> bool:
        return wanted or bool(self.trained())

    def backward(
        self, inputs: Sequence[Tensor] | None, extras: Sequence[Extra], grads: Sequence[Tensor], wanted: bool
    ) -> tuple[tuple[Tensor | None, ...], list[Tensor | None]]:
        module, trained = self.module, self.trained()
        if not self.reads_inputs(wanted):
            return (None,), []
        assert inputs is not None
        which = [wanted, *(any(p is own for p in trained) for own in (module.weight, module.bias))]
        x = self._cast(inputs[0])
        dx, dw, db = torch.ops.aten.native_layer_norm_backward(
            grads[0].to(x.dtype),
            x,
            module.normalized_shape,
            *extras,
            self._cast(module.weight),
            self._cast(module.bias),
            which,
        )
        return (dx.to(inputs[0].dtype) if wanted else None,), [
            g.to(module.weight.dtype) for g, asked in zip((dw, db), which[1:], strict=True) if asked
        ]


def _wide(x: Tensor) -> torch.dtype:
    """fp32, or fp64 where x has it."""
    return torch.promote_types(x.dtype, torch.float32)


def _rows(x: Tensor) -> Tensor:
    return x.flatten(0, -2).sum(0)
