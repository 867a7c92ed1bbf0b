"""Many tensors as one: a collective costs its latency once for a bucket, not once for each tensor in it.

`buckets` says which tensors travel together, `Flat` is the memory in which they lie side by side. DDP does both by
itself (Li et al., arXiv 2006.15704, section 3.2.3); these are for what is exchanged beside it, as compressed gradients.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterable, Sequence

import torch
from torch import Tensor

ALIGNMENT = 16
"""Bytes to which each tensor's place is aligned: vectorised kernels load as many at once."""


def buckets(sizes_bytes: Sequence[int], cap_bytes: int, *, first_bytes: int | None = None) -> list[list[int]]:
    """Indices into `sizes_bytes`, bucket by bucket, in the order in which a backward pass has their gradients.

    That is the reverse of the order of registration. A bucket is closed when the next tensor would take it over
    `cap_bytes`, so only a tensor that is larger alone exceeds it. `first_bytes` caps the first bucket instead, which
    can then leave early (DDP's is 1 MiB).
    """
    if cap_bytes < 1 or (first_bytes is not None and first_bytes < 1):
        raise ValueError(f"a bucket of {cap_bytes} bytes, the first of {first_bytes}: both must be positive")
    result: list[list[int]] = []
    used = 0
    for index in reversed(range(len(sizes_bytes))):
        cap = first_bytes if first_bytes is not None and len(result) <= 1 else cap_bytes
        if not result or used + sizes_bytes[index] > cap:
            result.append([])
            used = 0
        result[-1].append(index)
        used += sizes_bytes[index]
    return result


class Flat:
    """One contiguous buffer with a view for each of `tensors`, of their shapes and in their order.

    All have one dtype and one device, which are the buffer's too, unless `dtype` says in what they travel. The gaps
    that alignment leaves are zero and stay zero under sums, so the whole `buffer` can be reduced. The values of
    `tensors` are not copied (see `pack`), and the tensors are not kept.
    """

    def __init__(self, tensors: Iterable[Tensor], *, dtype: torch.dtype | None = None) -> None:
        tensors = list(tensors)
        kinds = {(tensor.dtype, tensor.device) for tensor in tensors}
        if len(kinds) != 1:
            found = ", ".join(sorted(f"{kind} on {device}" for kind, device in kinds)) or "none"
            raise ValueError(f"a flat buffer holds tensors of one dtype on one device; given are {found}")
        kind, device = kinds.pop()
        kind = dtype or kind
        self.shapes = [tensor.shape for tensor in tensors]
        step = max(ALIGNMENT // kind.itemsize, 1)
        sizes = [math.ceil(tensor.numel() / step) * step for tensor in tensors]
        *starts, total = itertools.accumulate(sizes, initial=0)
        self.buffer = torch.zeros(total, dtype=kind, device=device)
        self.views = [
            self.buffer[start : start + shape.numel()].view(shape)
            for start, shape in zip(starts, self.shapes, strict=True)
        ]

    @torch.no_grad()
    def pack(self, tensors: Iterable[Tensor]) -> Tensor:
        """Copies the values of `tensors` into the buffer, in place; returns the buffer."""
        torch._foreach_copy_(self.views, self._checked(tensors))
        return self.buffer

    @torch.no_grad()
    def unpack(self, tensors: Iterable[Tensor]) -> None:
        """Copies the buffer's values into `tensors`, in place."""
        torch._foreach_copy_(self._checked(tensors), self.views)

    def _checked(self, tensors: Iterable[Tensor]) -> list[Tensor]:
        """A copy would broadcast a tensor of another shape without a word."""
        tensors = list(tensors)
        shapes = [tensor.shape for tensor in tensors]
        assert shapes == self.shapes, f"{shapes} are not the shapes of this buffer, {self.shapes}"
        return tensors
