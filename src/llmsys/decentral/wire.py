"""Tensors as they travel: their elements once, and the strides with which they arrive.

A transposed tensor stays transposed, so that the receiver's kernels choose as the sender's would have; an expanded one
is sent unexpanded.
"""

from __future__ import annotations

from typing import NamedTuple

from torch import Tensor


class Layout(NamedTuple):
    """How `unpack` makes of a flat message what `pack` was given: `order` of its dimensions from the outermost in
    memory; `shape`; which dimensions are `expanded`."""

    shape: tuple[int, ...]
    order: tuple[int, ...]
    expanded: tuple[bool, ...]


def pack(tensor: Tensor) -> tuple[Tensor, Layout]:
    """(its elements once, contiguous, in the order in which they lie in memory, how they lay)."""
    expanded = tuple(stride == 0 and size > 1 for size, stride in zip(tensor.shape, tensor.stride(), strict=True))
    for dim, each in enumerate(expanded):
        if each:
            tensor = tensor.narrow(dim, 0, 1)
    strides = tensor.stride()
    order = tuple(sorted(range(len(strides)), key=lambda dim: (-strides[dim], dim)))
    shape = tuple(tensor.shape)
    return tensor.permute(order).contiguous(), Layout(shape, order, expanded)


def unpack(message: Tensor, layout: Layout, shape: tuple[int, ...]) -> Tensor:
    """As it lay, of `shape`. ValueError for a message of another size."""
    sizes = [layout.shape[dim] for dim in layout.order]
    if list(message.shape) != sizes:
        raise ValueError(f"a message of shape {tuple(message.shape)}: {tuple(sizes)} was said")
    back = [0] * len(layout.order)
    for place, dim in enumerate(layout.order):
        back[dim] = place
    return message.permute(back).expand(shape)
