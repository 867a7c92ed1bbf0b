"""What one all-reduce carries: factors, and what travels whole, side by side without gaps."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from llmsys.compress.config import CompressConfig
from llmsys.compress.methods.method import where


def dtype_of(tensor: Tensor) -> torch.dtype:
    """In what factors of it are computed: fp32, or fp64 for fp64."""
    return torch.float64 if tensor.dtype == torch.float64 else torch.float32


def rounded(tensor: Tensor, config: CompressConfig) -> Tensor:
    """As it will have been on the wire: what is rounded off there has not been sent. Itself, where nothing is."""
    return tensor.to(torch.bfloat16).to(tensor.dtype) if config.wire == "bf16" else tensor


def copy(targets: Sequence[Tensor], sources: Sequence[Tensor]) -> None:
    """Each of `targets`, in place, of its source; there may be none."""
    if targets:
        torch._foreach_copy_(list(targets), list(sources))


class Wire:
    """A `buffer` [total] with a copy of each of `tensors`, of which `views` are in their order and shapes.

    `compressed`: some of them stand for more than themselves, and all travel in fp32. Else they are gradients, which
    travel in the type that they are in, as without compression.
    """

    def __init__(self, tensors: Sequence[Tensor], config: CompressConfig, compressed: bool) -> None:
        dtype = dtype_of(tensors[0]) if compressed else tensors[0].dtype
        dtype = torch.bfloat16 if config.wire == "bf16" else dtype
        sizes = [tensor.numel() for tensor in tensors]
        self.buffer = torch.empty(sum(sizes), dtype=dtype, device=tensors[0].device)
        pieces = self.buffer.split(sizes)
        self.views = [piece.view(tensor.shape) for piece, tensor in zip(pieces, tensors, strict=True)]
        copy(self.views, tensors)

    def divide(self, world: int, finite: Tensor) -> None:
        """Makes the buffer, in place, this rank's share of the mean; where its gradients were not `finite`, NaN, so
        that all ranks notice. Before the sum, which then fits into the range of what is summed."""
        self.buffer.div_(world)
        where(~finite, self.buffer, math.nan)

    def finite(self) -> Tensor:
        """Whether all that has arrived is finite (bool, 0-dim); the same on all ranks, as they have the same sum."""
        return torch.isfinite(self.buffer.sum(dtype=torch.float32 if self.buffer.element_size() < 4 else None))
