"""What of a model gets a span of its own: its modules by `taxonomy`, each once, and the steps of eager attention."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import nn
from torch.nn import functional as F
from torch.overrides import TorchFunctionMode

from llmsys.profile import taxonomy
from llmsys.profile.taxonomy import BACKWARD, FORWARD, RECOMPUTE

Owner = tuple["Part", str]
"""A part, and in which of `taxonomy.KINDS` it is; no kind (empty) for what is outside both passes."""


class Part:
    """A module, an operator or a phase of the step: what time can belong to."""

    __slots__ = ("_row", "backward", "calls_modules", "forward", "name", "recompute")

    def __init__(self, row: str, name: str = "") -> None:
        self._row, self.name = row, name
        self.calls_modules = False
        """Whether a module with a part of its own was called within it."""
        self.forward: Owner = (self, FORWARD)
        self.backward: Owner = (self, BACKWARD)
        self.recompute: Owner = (self, RECOMPUTE)

    @property
    def row(self) -> str:
        """Of the table. A block that calls none of its modules is more than what lies between them."""
        return "block" if self._row == "residual" and not self.calls_modules else self._row


def find(model: nn.Module) -> list[tuple[nn.Module, Part]]:
    """Every module that gets a span, the model itself first, in the order of `named_modules`. Within one that counts
    whole none has a span of its own."""
    rotary = any("Rotary" in type(module).__name__ for module in model.modules())
    found: dict[int, tuple[nn.Module, Part]] = {id(model): (model, Part("model"))}

    def walk(parent: nn.Module, prefix: str) -> None:
        for own, module in parent.named_children():
            name = f"{prefix}{own}"
            place = taxonomy.place(
                name,
                type(module).__mro__,
                leaf=next(module.children(), None) is None,
                parameters=any(p is not None for p in module._parameters.values()),
                rotary=rotary,
            )
            if place is not None and place.row == "dropout" and not getattr(module, "p", 1.0):
                continue  # which does nothing
            if place is not None:  # tied embeddings are one module under three names
                found.setdefault(id(module), (module, Part(place.row, name)))
            if place is None or place.around:
                walk(module, f"{name}.")

    walk(model, "")
    return list(found.values())


class Steps(TorchFunctionMode):
    """Within the block, tells the softmax and the product after it apart from what comes before, whoever's code it is:
    `passed(i, x)` is called before step i + 1 begins, with the operand that step i has made."""

    def __init__(self, passed: Callable[[int, Any], None]) -> None:
        super().__init__()
        self._passed, self._step = passed, 0

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if self._step < len(_NEXT) and func in _NEXT[self._step] and args:
            self._passed(self._step, args[0])
            self._step += 1
        return func(*args, **(kwargs or {}))


_NEXT = (
    (F.softmax, torch.softmax, torch.Tensor.softmax),
    (torch.matmul, torch.Tensor.matmul, torch.Tensor.__matmul__, torch.bmm),
)
"""What ends the scores, and what ends the softmax."""
