"""One rank on one device: the engine and the gradient exchange that do nothing. Everything else is measured by them."""

from __future__ import annotations

import contextlib
from contextlib import AbstractContextManager

from torch import Tensor, nn


class Local:
    """The plain `Engine`."""

    rank = 0
    world = 1
    divisor = 1

    def wrap(self, model: nn.Module) -> nn.Module:
        return model

    def accumulate(self, model: nn.Module, last: bool) -> AbstractContextManager[None]:
        return contextlib.nullcontext()

    def backward(self, loss: Tensor) -> None:
        loss.backward()

    def clip(self, parameters: list[nn.Parameter], max_norm: float) -> Tensor:
        if max_norm:
            return nn.utils.clip_grad_norm_(parameters, max_norm)
        return nn.utils.get_total_norm([p.grad for p in parameters if p.grad is not None])

    def sum(self, value: float) -> float:
        return value


class NoSync:
    """The plain `GradSync`: nothing to exchange, or the engine does it by itself."""

    def attach(self, model: nn.Module) -> None:
        pass

    def aggregate(self, model: nn.Module) -> None:
        pass
