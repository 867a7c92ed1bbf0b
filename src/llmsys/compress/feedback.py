"""Error feedback (Karimireddy et al., arXiv 1901.09847): what was not sent is added to the next gradient."""

from __future__ import annotations

from collections.abc import Iterable
from functools import partial

import torch
from torch import Tensor

from llmsys.compress.config import CompressConfig
from llmsys.compress.methods.method import Entry, Taken


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


def spend(entries: Iterable[Entry]) -> list[Taken]:
    """Adds to each of these gradients, in place, what is kept of earlier ones: for parameters of which nothing is kept
    from now on, as another method or other settings have kept it. It is dropped when it is known to be applied."""
    taken = []
    for entry in entries:
        if entry.memory.error is not None:
            entry.grad.add_(entry.memory.error.to(entry.grad.device))
            taken.append(Taken(entry, commit=partial(setattr, entry.memory, "error", None)))
    return taken
