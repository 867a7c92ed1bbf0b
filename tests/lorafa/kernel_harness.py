"""Compares Triton's kernels with the plain versions in Triton's interpreter, and prints what differs as JSON.

A program, since Triton asks for TRITON_INTERPRET when it is imported:  TRITON_INTERPRET=1 python kernel_harness.py

The interpreter of Triton 3.9 cuts off what does not fit into bf16, where a GPU rounds to nearest (cvt.rn.bf16.f32, see
`kernel_compiler`): its conversion is replaced by one that does.
"""

from __future__ import annotations

import itertools
import json
import sys
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from llmsys.lorafa import kernels
from llmsys.lorafa.config import LoRAFAConfig
from llmsys.lorafa.layer import Adapter, adapt
from llmsys.lorafa.pieces.activation import Activation
from llmsys.lorafa.pieces.dropout import Dropout
from llmsys.lorafa.pieces.linears import Linears
from llmsys.lorafa.pieces.norm import RMSNorm
from llmsys.lorafa.pieces.piece import Chain, run

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


class Norm(nn.Module):
    """What pieces read of transformers' norms."""

    def __init__(self, width: int, dtype: torch.dtype) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(width).to(dtype))
        self.variance_epsilon = 1e-5


def round_to_bf16() -> None:
    """Makes the interpreter round, in place of cutting off."""
    from triton import language as tl
    from triton.runtime import interpreter

    convert = interpreter._convert_float

    def rounding(value: Any, source: Any, target: Any, mode: Any) -> Any:
        if (source, target) != (tl.float32, tl.bfloat16):
            return convert(value, source, target, mode)
        # a view of the bits of bf16, of which numpy knows nothing
        exact = torch.from_numpy(np.ascontiguousarray(value))
        return exact.bfloat16().view(torch.int16).numpy().view(np.uint16).reshape(value.shape)

    interpreter._convert_float = rounding


@contextmanager
def plain() -> Iterator[None]:
    """Pieces do without kernels."""
    serve = kernels.serve
    kernels.serve = lambda x: False
    try:
        yield
    finally:
        kernels.serve = serve


def both(piece: Any, *inputs: Tensor) -> list[list[Tensor]]:
    """[outputs, gradients of inputs and of what is trained], by kernels and by plain torch."""
    found = []
    for context in (warnings.catch_warnings, plain):
        with context():
            own = [x.detach().clone().requires_grad_() for x in inputs]
            y = run(piece, *own)
            generator = torch.Generator().manual_seed(1)
            dy = torch.randn(y.shape, generator=generator, device="cpu").to(y)
            found.append([y.detach(), *torch.autograd.grad(y, [*own, *piece.trained()], dy)])
    return found


def difference(piece: Any, *inputs: Tensor) -> dict[str, float]:
    """The largest relative difference in norm, and the largest share of elements whose bits differ."""
    pairs = list(zip(*both(piece, *inputs), strict=True))
    assert all(x.dtype == y.dtype and x.shape == y.shape for x, y in pairs)
    return {
        "norm": max(float((x.double() - y.double()).norm() / y.double().norm()) for x, y in pairs),
        "bits": max(float((x != y).double().mean()) for x, y in pairs),
    }


def norms() -> dict[str, Any]:
    """Widths that are no power of two, a batch that is not contiguous, and weights wider than x."""
    found = {}
    for (name, dtype), width in itertools.product(DTYPES.items(), (60, 64, 300)):
        found[f"{name} {width}"] = difference(RMSNorm(Norm(width, dtype)), torch.randn(3, 5, width).to(dtype))
    across = torch.randn(5, 3, 60).transpose(0, 1)
    found["fp32 not contiguous"] = difference(RMSNorm(Norm(60, torch.float32)), across)
    found["bf16 under an fp32 weight"] = difference(RMSNorm(Norm(60, torch.float32)), torch.randn(7, 60).bfloat16())
    return found


def gates() -> dict[str, Any]:
    found = {}
    for (name, dtype), kind in itertools.product(DTYPES.items(), ("silu", "gelu", "gelu_tanh", "relu")):
        gate, up = (2 * torch.randn(3, 777).to(dtype) for _ in range(2))
        found[f"{name} {kind}"] = difference(Activation(kind), gate, up)
    return found


def blocks() -> dict[str, Any]:
    """A whole MLP with adapters, of which gate and up are computed again, without dropout."""
    config, found = LoRAFAConfig(r=4), {}
    for name, dtype in DTYPES.items():
        layers = []
        for outputs, inputs in ((96, 40), (96, 40), (40, 96)):
            layer = adapt(nn.Linear(inputs, outputs, bias=False, dtype=dtype).requires_grad_(False))
            layer.adapters["default"] = Adapter(config, "layer", torch.randn(4, inputs).to(dtype) / 8, outputs, dtype)
            nn.init.normal_(layer.adapters["default"].B, std=0.1)
            layer.active = "default"
            layers.append(layer)
        norm = RMSNorm(Norm(40, dtype).requires_grad_(False))
        mlp = Chain(norm, Linears(layers[:2]), Activation("silu"), Linears(layers[2:]))
        found[name] = difference(mlp, torch.randn(2, 6, 40).to(dtype))
    return found


def masks() -> dict[str, Any]:
    """Of 16,650 elements: the share dropped, whether both passes drop the same, and how seeds and neighbours agree."""
    found = {}
    for name, dtype in list(DTYPES.items())[:2]:
        x = torch.randn(50, 333).to(dtype)
        x[x == 0] = 1
        y = kernels.dropped(x, 0.1, 2**61 + 5)
        kept = y != 0
        torch.manual_seed(3)
        own = x.detach().clone().requires_grad_()
        out = run(Dropout(0.1), own)
        out.backward(x)  # so that the gradient is what the output is
        found[name] = {
            "dropped": float((~kept).double().mean()),
            "scaled": bool(torch.equal(y, (x * kept).mul_(1 / 0.9))),
            "again": bool(torch.equal(y, kernels.dropped(x, 0.1, 2**61 + 5))),
            "backward": bool(own.grad is not None and torch.equal(own.grad, out)),
            "agree": float(((kernels.dropped(x, 0.1, 2**61 + 6) != 0) == kept).double().mean()),
            "neighbours": float((kept.flatten()[1:] == kept.flatten()[:-1]).double().mean()),
        }
    return found


def empty() -> dict[str, Any]:
    none = torch.randn(0, 60)
    return {"rows": [*kernels.rms_norm(none, torch.randn(60), 1e-5, torch.float32)[0].shape]}


if __name__ == "__main__":
    torch.manual_seed(0)
    torch.set_num_threads(1)
    round_to_bf16()
    assert kernels.serve(torch.ones(2)), "not in the interpreter"
    assert not kernels.serve(torch.ones(2, dtype=torch.float64)), "fp64 is for plain torch"
    json.dump({f.__name__: f() for f in (norms, gates, blocks, masks, empty)}, sys.stdout)
