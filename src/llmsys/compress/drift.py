"""Whether all ranks still have the same numbers.

Gradients reach every rank as the same factors, but each rank makes them orthonormal and multiplies them out itself. Two
kinds of CPU or GPU, or two builds of their libraries, round these differently, in the last bit: replicas then drift
apart step by step, and no loss says so. DDP's own all-reduce, which gives every rank the same sum, knows no such thing.

A checksum of what ranks should have alike is compared now and then (`CompressConfig.check_every`). It is made of the
bits as whole numbers, whose sum depends neither on the order nor on the device.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
import torch.distributed as dist
from torch import Tensor

from llmsys.compress.transfer import Group

WHY = "they began differently, or machines round differently: see docs/compress.md"
WORDS = {1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int64}
"""Bytes of an element -> the whole number that has its bits."""
PIECE = 1 << 18
"""Elements that are summed at a time: 2 MiB beside the tensor."""
ODD = 0x1E3779B97F4A7C15
"""Times an element's place, this is its weight in the sum: two changes that cancel each other are seen all the same."""


def apart(tensors: Mapping[str, Tensor], group: Group) -> bool:
    """Whether `tensors` are not the same on all ranks of `group`, to the bit. Waits for the device. Collective: one
    all-reduce of two numbers."""
    if not dist.is_initialized() or dist.get_world_size(group) == 1:
        return False
    number = sum(place * int(checksum(tensors[name])) for place, name in enumerate(sorted(tensors), 1))
    number = number % 2**62  # a whole number that has a negative
    both = torch.tensor([number, -number], dtype=torch.int64, device=next(iter(tensors.values())).device)
    dist.all_reduce(both, dist.ReduceOp.MAX, group=group)
    return int(both.sum()) != 0


def checksum(tensor: Tensor) -> Tensor:
    """int64, 0-dim, of the bits of `tensor`; modulo 2**64."""
    flat = tensor.detach().contiguous().view(-1).view(WORDS[tensor.element_size()])
    total = torch.zeros((), dtype=torch.int64, device=tensor.device)
    for start in range(0, len(flat), PIECE):
        piece = flat[start : start + PIECE]
        weights = torch.arange(start, start + len(piece), device=tensor.device).mul_(ODD).bitwise_or_(1)
        total += weights.mul_(piece).sum()
    return total
