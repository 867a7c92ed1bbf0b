"""Error feedback (Karimireddy et al., arXiv 1901.09847): what was not sent is added to the next gradient."""

from __future__ import annotations

import torch
from torch import Tensor

from llmsys.compress.config import CompressConfig
from llmsys.compress.methods.method import Entry


def corrected(entry: Entry, config: CompressConfig) -> Tensor:
    """G + E, in the gradient's shape: in place of E, from which is then to be taken what is sent; or, where errors are
    not kept, G itself."""
    if not config.feedback:
        return entry.grad
    memory, half = entry.memory, entry.grad.element_size() < 4
    dtype = torch.float32 if half and config.error_dtype != "half" else entry.grad.dtype
    if memory.error is None:
        memory.error = torch.zeros(entry.grad.shape, dtype=dtype, device=entry.grad.device)
    memory.error = memory.error.to(entry.grad.device, dtype)  # itself, but after it was read from a file
    return memory.error.add_(entry.grad)
