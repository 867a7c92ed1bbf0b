"""Compiles every kernel for a GPU that need not be there, and prints as JSON how its bf16 is rounded.

A program, since Triton must not be in its interpreter:  python kernel_compiler.py
"""

from __future__ import annotations

import json
import re
import sys
from typing import Any

import torch
import triton
import triton.language as tl
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from llmsys.lorafa.kernels import gate, launch, mask, norm

H100 = GPUTarget("cuda", 90, 32)
B, F = "*bf16", "*fp32"
X = {"x": B, "w": B}
KERNELS: list[tuple[Any, dict[str, str], dict[str, Any]]] = [
    (
        norm._forward,
        {**X, "y": B, "rstd": F, "width": "i32", "eps": "fp32"},
        {"ROUNDED": tl.bfloat16, "AGAIN": False, "BLOCK": 4096},
    ),
    (
        norm._backward,
        {**X, "dy": B, "rstd": F, "dx": B, "dw": F, "rows": "i32", "width": "i32"},
        {"ROUNDED": tl.bfloat16, "G": tl.bfloat16, "P": tl.bfloat16, "DX": True, "DW": True, "BLOCK": 4096},
    ),
    *((gate._forward, {"g": B, "u": B, "y": B, "numel": "i64"}, {"KIND": kind, "BLOCK": 1024}) for kind in gate.KINDS),
    *(
        (gate._backward, {"g": B, "u": B, "dy": B, "dg": B, "du": B, "numel": "i64"}, {"KIND": kind, "BLOCK": 1024})
        for kind in gate.KINDS
    ),
    (
        mask._dropped,
        {"x": B, "y": B, "numel": "i64", "seed": "i64", "threshold": "i64", "scale": "fp32"},
        {"BLOCK": 1024},
    ),
]


def compiled(kernel: Any, signature: dict[str, str], constants: dict[str, Any]) -> dict[str, Any]:
    source = ASTSource(
        fn=kernel,
        signature={**signature, **dict.fromkeys(constants, "constexpr")},
        constexprs={(kernel.arg_names.index(name),): value for name, value in constants.items()},
    )
    made = triton.compile(source, target=H100, options={"num_warps": 8, **launch.OPTIONS})
    return {
        "name": f"{kernel.__module__}.{kernel.__name__}",
        "bytes": len(made.asm["cubin"]),
        "to_bf16": sorted(set(re.findall(r"cvt\.\w+(?:\.\w+)*\.bf16(?:x2)?\.f32", made.asm["ptx"]))),
    }


if __name__ == "__main__":
    torch.set_num_threads(1)
    json.dump([compiled(*kernel) for kernel in KERNELS], sys.stdout)
