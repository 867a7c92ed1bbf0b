"""The loss scale, read before a step's forward pass.

It is a number on the GPU, and to read it is to wait for all that was asked of the GPU before. When the first bucket of
gradients comes, that holds up the backward pass, which is asked for faster than it is done. Before the forward pass
there is little to wait for: GradScaler itself has waited for the gradients, and the optimizer's step is all that is
left.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch.nn.parallel import DistributedDataParallel


class ReadAhead:
    """Gives, once, what `read` gave when `model` last began a pass whose gradients it will exchange; if there was none
    since, it reads."""

    def __init__(self, read: Callable[[], float], model: DistributedDataParallel) -> None:
        self._read = read
        self._found: float | None = None
        model.register_forward_pre_hook(self._begins)

    def _begins(self, model: Any, inputs: Any) -> None:
        if torch.is_grad_enabled() and model.require_backward_grad_sync:
            self._found = self._read()

    def __call__(self) -> float:
        found, self._found = self._found, None
        return self._read() if found is None else found
