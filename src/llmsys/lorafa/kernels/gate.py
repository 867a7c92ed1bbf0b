"""y = f(g) u and its derivative, in one pass: SwiGLU and its kin (arXiv 2002.05202); see `pieces.activation`.

f(g), its product with u, and dy u are rounded to the tensors' dtype, as torch's operators one after another do it.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from llmsys.lorafa.kernels.launch import BLOCK, OPTIONS, blocks, on

KINDS = ("silu", "gelu", "gelu_tanh", "relu")


@triton.jit
def _sigmoid(x):
    return 1.0 / (1.0 + tl.exp(-x))


@triton.jit
def _function(x, KIND: tl.constexpr):
    """f(x), in fp32."""
    if KIND == "silu":
        return x * _sigmoid(x)
    elif KIND == "gelu":
        return 0.5 * x * (1.0 + tl.math.erf(x * 0.7071067811865476))
    elif KIND == "gelu_tanh":  # 0.5 (1 + tanh(z)) = sigmoid(2 z)
        return x * _sigmoid(1.5957691216057308 * (x + 0.044715 * x * x * x))
    else:
        tl.static_assert(KIND == "relu")
        return tl.where(x > 0, x, 0.0)


@triton.jit
def _derivative(x, KIND: tl.constexpr):
    """f'(x), in fp32."""
    if KIND == "silu":
        s = _sigmoid(x)
        return s * (1.0 + x * (1.0 - s))
    elif KIND == "gelu":
        density = tl.exp(-0.5 * x * x) * 0.3989422804014327
        return 0.5 * (1.0 + tl.math.erf(x * 0.7071067811865476)) + x * density
    elif KIND == "gelu_tanh":
        s = _sigmoid(1.5957691216057308 * (x + 0.044715 * x * x * x))
        return s + x * s * (1.0 - s) * 1.5957691216057308 * (1.0 + 0.134145 * x * x)
    else:
        tl.static_assert(KIND == "relu")
        return tl.where(x > 0, 1.0, 0.0)


@triton.jit
def _forward(g, u, y, numel, KIND: tl.constexpr, BLOCK: tl.constexpr):
    at = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    inside = at < numel
    gate = tl.load(g + at, mask=inside, other=0.0).to(tl.float32)
    up = tl.load(u + at, mask=inside, other=0.0).to(tl.float32)
    value = _function(gate, KIND).to(y.dtype.element_ty).to(tl.float32)
    tl.store(y + at, (value * up).to(y.dtype.element_ty), mask=inside)


@triton.jit
def _backward(g, u, dy, dg, du, numel, KIND: tl.constexpr, BLOCK: tl.constexpr):
    at = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    inside = at < numel
    gate = tl.load(g + at, mask=inside, other=0.0).to(tl.float32)
    up = tl.load(u + at, mask=inside, other=0.0).to(tl.float32)
    gradient = tl.load(dy + at, mask=inside, other=0.0).to(tl.float32)
    value = _function(gate, KIND).to(g.dtype.element_ty).to(tl.float32)
    tl.store(du + at, (gradient * value).to(du.dtype.element_ty), mask=inside)
    into = (gradient * up).to(g.dtype.element_ty).to(tl.float32)
    tl.store(dg + at, (into * _derivative(gate, KIND)).to(dg.dtype.element_ty), mask=inside)


def gated(kind: str, gate: Tensor, up: Tensor) -> Tensor:
    """f(gate) up, elementwise; both of one shape and dtype."""
    gate, up = gate.contiguous(), up.contiguous()
    y = torch.empty_like(gate)
    if y.numel():
        with on(y):
            _forward[blocks(y.numel())](gate, up, y, y.numel(), KIND=kind, BLOCK=BLOCK, **OPTIONS)
    return y


def gated_backward(kind: str, gate: Tensor, up: Tensor, dy: Tensor) -> tuple[Tensor, Tensor]:
    """(dgate, dup)."""
    gate, up, dy = gate.contiguous(), up.contiguous(), dy.contiguous()
    dgate, dup = torch.empty_like(gate), torch.empty_like(up)
    if dy.numel():
        with on(dy):
            grid = blocks(dy.numel())
            _backward[grid](gate, up, dy, dgate, dup, dy.numel(), KIND=kind, BLOCK=BLOCK, **OPTIONS)
    return dgate, dup
