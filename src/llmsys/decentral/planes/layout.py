"""Torch's tensors as they travel (`wire.Array`): their elements once, and the strides with which they arrive.

A transposed tensor stays transposed, so that the receiver's kernels choose as the sender's would have; an expanded one
is sent unexpanded.
"""

from __future__ import annotations

import torch
from torch import Tensor

from llmsys.decentral.wire import Array


def packed(tensor: Tensor) -> Array:
    """What of `tensor` travels: no reference to it is kept."""
    sizes, strides = tuple(tensor.shape), tensor.stride()
    expanded = tuple(stride == 0 and size > 1 for size, stride in zip(sizes, strides, strict=True))
    tensor = tensor.detach()
    for dim, each in enumerate(expanded):
        if each:
            tensor = tensor.narrow(dim, 0, 1)
    strides = tensor.stride()
    order = tuple(sorted(range(len(strides)), key=lambda dim: (-strides[dim], dim)))
    flat = tensor.permute(order).contiguous().cpu().reshape(-1)
    data = flat.view(torch.uint8).numpy().tobytes() if flat.numel() else b""
    return Array(dtype=str(tensor.dtype).removeprefix("torch."), shape=sizes, order=order, expanded=expanded, data=data)


def unpacked(array: Array, device: torch.device | str = "cpu") -> Tensor:
    """As it lay, in memory of its own. ValueError for bytes of another number than its shape has."""
    dtype = getattr(torch, array.dtype)
    sizes = array.sent_shape
    flat = torch.frombuffer(bytearray(array.data), dtype=dtype) if array.data else torch.empty(0, dtype=dtype)
    back = [0] * len(array.order)
    for place, dim in enumerate(array.order):
        back[dim] = place
    whole: Tensor = flat.reshape(sizes).to(device).permute(back).expand(array.shape)
    return whole
