"""What launching a kernel needs to know. Imports Triton."""

from __future__ import annotations

import contextlib
from contextlib import AbstractContextManager

import torch
import triton
import triton.language as tl
from torch import Tensor

BLOCK = 1024
"""Elements a program of an elementwise kernel."""
OPTIONS = {"enable_fp_fusion": False}
"""Every product rounds by itself, as between torch's operators; these kernels wait for memory, not for arithmetic."""
TYPES = {torch.float32: tl.float32, torch.bfloat16: tl.bfloat16, torch.float16: tl.float16}


def on(x: Tensor) -> AbstractContextManager[object]:
    """Where a kernel that reads `x` has to be launched: Triton takes the present device, whosever the pointers are."""
    return torch.cuda.device(x.device) if x.is_cuda else contextlib.nullcontext()


def row_block(width: int) -> tuple[int, int]:
    """(power of two that holds a row, warps): at most 16 columns a thread up to 8192, then 32 warps at most."""
    block = triton.next_power_of_2(width)
    return block, min(max(block // 512, 4), 32)


def blocks(numel: int, block: int = BLOCK) -> tuple[int]:
    """The grid of an elementwise kernel."""
    return (triton.cdiv(numel, block),)


def programs(x: Tensor, rows: int) -> int:
    """How many programs share the rows where each adds up over its own: as many as run at once."""
    most = 4 * torch.cuda.get_device_properties(x.device).multi_processor_count if x.is_cuda else 4
    return max(1, min(rows, most))
