"""Linear layers that multiply in 8-bit floats and are trained (Micikevicius et al., arXiv 2209.05433).

The weights stay what they are, bf16 or fp32, and so does the optimizer. For each product both operands are scaled by
their own largest magnitude, so that it becomes the largest number of the format, and rounded; the product is summed in
fp32 and scaled back ("dynamic scaling", one scale for a tensor):

    y  = x W^T     x and W with 4 bits of exponent and 3 of mantissa (e4m3, up to 448)
    dx = dy W      dy with 5 and 2 (e5m2, up to 57344): gradients need range more than precision
    dW = dy^T x

The product alone takes half of bf16's time where tensor cores have the format (compute capability 8.9: Ada and Hopper
on). Scaling and rounding are passes over both operands, the weight's in every micro-batch, so a layer gains only with
thousands of rows: of 350 rows and a weight of 4096 x 4096 the product is the smaller part. What autograd keeps is the
input as it came, which layers of one input share. Shapes: T rows, N inputs, M outputs; the kernel wants N
and M to be multiples of 16, and rows are padded to one.
"""

from __future__ import annotations

import logging
from typing import Any

import torch
from torch import Tensor, nn

from llmsys.models.surgery import BLOCK

log = logging.getLogger(__name__)

MULTIPLE = 16
FORWARD, BACKWARD = torch.float8_e4m3fn, torch.float8_e5m2
LEAST = (8, 9)
"""Compute capability of the first GPUs that have it."""


class Float8Linear(nn.Linear):
    """A linear layer whose three products are in 8-bit floats."""

    def forward(self, x: Tensor) -> Tensor:
        kind = x.device.type
        dtype = torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else x.dtype
        with torch.autocast(kind, enabled=False):
            y: Tensor = _Product.apply(x.to(dtype), self.weight)
        return y if self.bias is None else y + self.bias.to(dtype)


class _Product(torch.autograd.Function):
    """y [..., M] = x [..., N] W^T, in the dtype of x."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor) -> Tensor:
        ctx.shape, ctx.dtype, ctx.weight_dtype = x.shape, x.dtype, weight.dtype
        ctx.save_for_backward(x if ctx.needs_input_grad[1] else None, weight if ctx.needs_input_grad[0] else None)
        return product(_rows(x), weight, FORWARD, FORWARD, x.dtype).view(*x.shape[:-1], weight.shape[0])

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, Tensor | None]:
        x, weight = ctx.saved_tensors
        g, dx, dw = _rows(dy), None, None
        if ctx.needs_input_grad[0]:
            dx = product(g, weight.t(), BACKWARD, FORWARD, ctx.dtype).view(ctx.shape)
        if ctx.needs_input_grad[1]:
            dw = product(g.t(), _rows(x).t(), BACKWARD, FORWARD, ctx.weight_dtype)
        return dx, dw


def product(a: Tensor, b: Tensor, a_format: torch.dtype, b_format: torch.dtype, out: torch.dtype) -> Tensor:
    """a [P, K] times b [Q, K] transposed -> [P, Q] in `out`, each operand rounded to its format."""
    rows, short = len(a), -a.shape[1] % MULTIPLE
    if short:  # of the rows that a gradient sums over: zeros add nothing
        a, b = (nn.functional.pad(part, (0, short)) for part in (a, b))
    a = nn.functional.pad(a, (0, 0, 0, -rows % MULTIPLE))
    (a8, a_scale), (b8, b_scale) = rounded(a, a_format), rounded(b, b_format)
    y: Tensor = torch._scaled_mm(a8.contiguous(), b8.contiguous().t(), scale_a=a_scale, scale_b=b_scale, out_dtype=out)
    return y[:rows]


def rounded(x: Tensor, kind: torch.dtype) -> tuple[Tensor, Tensor]:
    """(x / scale in the format `kind`, scale): the largest magnitude becomes the format's largest number."""
    largest = torch.finfo(kind).max
    scale = x.detach().abs().amax().float().clamp_min(1e-30) / largest
    return (x.float() / scale).clamp(-largest, largest).to(kind), scale


def convert(model: nn.Module) -> list[str]:
    """Makes, in place, the linear layers of the blocks `Float8Linear`s, with the weights that they have; their names.

    A layer whose widths are no multiples of 16 stays as it is, which the log says. ValueError where none is left.
    """
    found: list[str] = []
    odd: list[str] = []
    for name, module in model.named_modules():
        if type(module) is nn.Linear and BLOCK.search(name):
            fits = module.in_features % MULTIPLE == 0 and module.out_features % MULTIPLE == 0
            (found if fits else odd).append(name)
    if not found:
        raise ValueError(f"train.fp8=true: no linear layer of the blocks has widths that are multiples of {MULTIPLE}")
    for name in found:
        model.get_submodule(name).__class__ = Float8Linear
    if odd:
        log.warning("train.fp8: %d layers whose widths are no multiples of 16 stay as they are: %s", len(odd), odd[0])
    log.info("train.fp8: %d linear layers", len(found))
    return found


def _rows(x: Tensor) -> Tensor:
    return x.reshape(-1, x.shape[-1])
