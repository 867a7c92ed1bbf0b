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

    Storages that were there before do not count, and those of meta tensors have no bytes. One that is resized, as FSDP
    does to free a gathered weight, counts as it is then. What a kernel allocates and frees inside itself is not seen.
    """

    def __init__(self) -> None:
        super().__init__()
        self.now = self.peak = self.largest = 0
        self._known: weakref.WeakSet[torch.UntypedStorage] = weakref.WeakSet()
        self._sizes: weakref.WeakKeyDictionary[torch.UntypedStorage, list[int]] = weakref.WeakKeyDictionary()

    def __enter__(self) -> Live:
        resize, seen = torch.UntypedStorage.resize_, self._resized

        def watched(storage: torch.UntypedStorage, size: int) -> Any:
            result = resize(storage, size)
            seen(storage)
            return result

        torch.UntypedStorage.resize_ = watched  # type: ignore[assignment, method-assign]
        self._resize = resize
        super().__enter__()
        return self

    def __exit__(self, *error: Any) -> None:
        torch.UntypedStorage.resize_ = self._resize  # type: ignore[method-assign]
        super().__exit__(*error)

    def mark(self) -> int:
        """Begins a new peak; returns the bytes alive now."""
        self.peak = self.now
        return self.now

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if any(hasattr(kind, "__tensor_flatten__") for kind in types):
            return NotImplemented  # a DTensor, which has no memory: what it does with its local part comes here again
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
        self._known.add(storage)
        if storage.device.type == "meta":
            return
        size = self._sizes[storage] = [0]
        self._resized(storage)
        weakref.finalize(storage, self._freed, size)

    def _resized(self, storage: torch.UntypedStorage) -> None:
        if storage not in self._sizes:
            return
        size, nbytes = self._sizes[storage], storage.nbytes()
        self.now += nbytes - size[0]
        size[0] = nbytes
        self.peak, self.largest = max(self.peak, self.now), max(self.largest, nbytes)

    def _freed(self, size: list[int]) -> None:
        self.now -= size[0]
