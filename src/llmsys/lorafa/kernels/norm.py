"""RMSNorm in one pass over its rows, a program a row: see `pieces.norm.RMSNorm` for the derivation.

    forward    rstd = (mean(x^2) + eps)^-1/2,  y = w round(x rstd)
    backward   g = round(w dy),  x^ = x rstd,  dx = rstd (g - x^ mean(g x^)),  dw = sum over rows of round(dy round(x^))

in fp32 but for what is rounded: `round` of x^ is to a dtype that the caller names, of products to their operands'.
For dw each of a few programs adds up its rows in fp32, and torch adds up the programs' sums: no atomic adds, so the
same bits every time. T rows, D width.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from llmsys.lorafa.kernels.launch import OPTIONS, TYPES, on, programs, row_block


@triton.jit
def _forward(
    x, w, y, rstd, width, eps,
    ROUNDED: tl.constexpr, AGAIN: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64)
    columns = tl.arange(0, BLOCK)
    inside = columns < width
    value = tl.load(x + row * width + columns, mask=inside, other=0.0).to(tl.float32)
    if AGAIN:
        scale = tl.load(rstd + row)
    else:
        scale = tl.math.rsqrt(tl.sum(value * value, axis=0) / width + eps)
        tl.store(rstd + row, scale)
    normed = (value * scale).to(ROUNDED).to(tl.float32)
    weight = tl.load(w + columns, mask=inside, other=0.0).to(tl.float32)
    tl.store(y + row * width + columns, (weight * normed).to(y.dtype.element_ty), mask=inside)


@triton.jit
def _backward(
    x, w, dy, rstd, dx, dw, rows, width,
    ROUNDED: tl.constexpr, G: tl.constexpr, P: tl.constexpr, DX: tl.constexpr, DW: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    program = tl.program_id(0).to(tl.int64)
    columns = tl.arange(0, BLOCK)
    inside = columns < width
    weight = tl.load(w + columns, mask=inside, other=0.0).to(tl.float32)
    total = tl.zeros([BLOCK], dtype=tl.float32)
    for index in range(program, rows, tl.num_programs(0)):
        start = index * width
        scale = tl.load(rstd + index)
        normed = tl.load(x + start + columns, mask=inside, other=0.0).to(tl.float32) * scale
        gradient = tl.load(dy + start + columns, mask=inside, other=0.0).to(tl.float32)
        if DW:
            total += (gradient * normed.to(ROUNDED).to(tl.float32)).to(P).to(tl.float32)
        if DX:
            g = (gradient * weight).to(G).to(tl.float32)
            mean = tl.sum(g * normed, axis=0) / width
            tl.store(dx + start + columns, ((g - normed * mean) * scale).to(dx.dtype.element_ty), mask=inside)
    if DW:
        tl.store(dw + program * width + columns, total, mask=inside)


def rms_norm(x: Tensor, weight: Tensor, eps: float, rounded: torch.dtype) -> tuple[Tensor, Tensor]:
    """(y [..., D], rstd [..., 1] in fp32) of x [..., D]; x^ is rounded to `rounded`, y as wide as that and weight."""
    rstd = torch.empty(*x.shape[:-1], 1, dtype=torch.float32, device=x.device)
    return _scaled(x, rstd, weight, eps, rounded, again=False), rstd


def rms_norm_again(x: Tensor, rstd: Tensor, weight: Tensor, rounded: torch.dtype) -> Tensor:
    """y once more, with the same bits."""
    return _scaled(x, rstd, weight, 0.0, rounded, again=True)


def _scaled(x: Tensor, rstd: Tensor, weight: Tensor, eps: float, rounded: torch.dtype, *, again: bool) -> Tensor:
    x, weight, width = x.contiguous(), weight.contiguous(), x.shape[-1]
    y = torch.empty(x.shape, dtype=torch.promote_types(rounded, weight.dtype), device=x.device)
    block, warps = row_block(width)
    if x.numel():
        with on(x):
            _forward[(x.numel() // width,)](
                x, weight, y, rstd, width, eps, ROUNDED=TYPES[rounded], AGAIN=again, BLOCK=block,
                num_warps=warps, **OPTIONS,
            )  # fmt: skip
    return y


def rms_norm_backward(
    x: Tensor, rstd: Tensor, weight: Tensor, dy: Tensor, rounded: torch.dtype, *, dx: bool, dw: bool
) -> tuple[Tensor | None, Tensor | None]:
    """(dx, dw), each where it is asked for, in the dtypes of x and weight."""
    x, weight, dy, width = x.contiguous(), weight.contiguous(), dy.contiguous(), x.shape[-1]
    rows, (block, warps) = x.numel() // width, row_block(width)
    # a program a row, or where dw is added up a few for all rows
    grid = programs(x, rows) if dw else rows
    gradient = torch.empty_like(x) if dx else None
    sums = torch.zeros(grid, width, dtype=torch.float32, device=x.device) if dw else None
    if x.numel():
        with on(x):
            _backward[(grid,)](
                x, weight, dy, rstd, gradient, sums, rows, width,
                ROUNDED=TYPES[rounded],
                G=TYPES[torch.promote_types(dy.dtype, weight.dtype)],
                P=TYPES[torch.promote_types(dy.dtype, rounded)],
                DX=dx, DW=dw, BLOCK=block, num_warps=warps, **OPTIONS,
            )  # fmt: skip
    return gradient, None if sums is None else sums.sum(0).to(weight.dtype)
