"""Bytes of the tensors that are alive: what a GPU's allocator counts, on any device, operator by operator.

Saved-tensor hooks see what autograd saves; a tensor that some function keeps as an attribute of its context they do not
see, nor what a backward pass makes for a moment. Here every storage that an operator returns is counted from then until
it is freed, whoever holds it. Works on FakeTensors too, which have shapes and no memory.
"""

from __future__ import annotations

import weakref
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_iter


class Live(TorchDispatchMode):
    """Counts the storages that operators make while it is on: `now`, `peak`, the most since `mark`, and the
    `largest` one.

    Storages that were there before do not count. What a kernel allocates and frees inside itself is not seen.
    """

    def __init__(self) -> None:
        super().__init__()
        self.now = self.peak = self.largest = 0
        self._known: weakref.WeakSet[torch.UntypedStorage] = weakref.WeakSet()

    def mark(self) -> int:
        """Begins a new peak; returns the bytes alive now."""
        self.peak = self.now
        return self.now

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        for tensor in tree_iter((args, kwargs)):
            if isinstance(tensor, torch.Tensor):
                self._known.add(tensor.untyped_storage())
        result = func(*args, **kwargs)
        for tensor in tree_iter(result):
            if isinstance(tensor, torch.Tensor) and tensor.untyped_storage() not in self._known:
                self._made(tensor.untyped_storage())
        return result

    def _made(self, storage: torch.UntypedStorage) -> None:
        nbytes = storage.nbytes()
        self._known.add(storage)
        self.now += nbytes
        self.peak, self.largest = max(self.peak, self.now), max(self.largest, nbytes)
        weakref.finalize(storage, self._freed, nbytes)

    def _freed(self, nbytes: int) -> None:
        self.now -= nbytes
