"""Signs as bits, eight in a byte: real packing, 32 times smaller than fp32."""

from __future__ import annotations

import functools
import math

import torch
from torch import Tensor

_GATHER = 0x0102040810204080
"""Multiplied with eight bytes of 0 or 1, as one number, this has them as the bits of its highest byte."""
AT_ONCE = 1 << 14
"""Bytes of signs at a time: 512 KiB of fp32."""


def pack(x: Tensor, *, zero: bool = True) -> Tensor:
    """uint8 [ceil(N / 8)] of x [N]: a bit is set where x is positive, and where it is 0 as `zero` says; those beyond N
    are not. A piece at a time: what is made between is eight times as large."""
    packed = torch.empty(math.ceil(x.numel() / 8), dtype=torch.uint8, device=x.device)
    for start in range(0, len(packed), AT_ONCE):
        piece = x[start * 8 : (start + AT_ONCE) * 8]
        positive = piece >= 0 if zero else piece > 0
        missing = -len(positive) % 8
        if missing:
            positive = torch.cat([positive, positive.new_zeros(missing)])
        words = positive.view(torch.uint8).view(torch.int64)
        packed[start : start + AT_ONCE] = words * _GATHER >> 56
    return packed


def unpack(packed: Tensor, numel: int) -> Tensor:
    """bool [numel] of what `pack` made."""
    return (table(packed.device)[packed.long()] > 0).view(-1)[:numel]


def add_signs(target: Tensor, packed: Tensor, scale: Tensor | float) -> None:
    """target [N], in place, += scale for every bit that is set, -= scale for every other; a piece at a time."""
    signs = table(target.device).to(target.dtype) * scale
    for start in range(0, len(packed), AT_ONCE):
        piece = target[start * 8 : (start + AT_ONCE) * 8]
        piece += signs[packed[start : start + AT_ONCE].long()].view(-1)[: len(piece)].to(piece.dtype)


@functools.cache
def table(device: torch.device) -> Tensor:
    """[256, 8]: +1 or -1 for each bit of a byte, in the order in which `pack` sets them."""
    ones = (torch.arange(256).unsqueeze(1) >> torch.arange(8)) & 1
    found = (2.0 * ones - 1.0).to(device)
    if found.is_cuda:
        torch.cuda.current_stream(device).synchronize()  # once: callbacks use it on streams of their own
    return found
