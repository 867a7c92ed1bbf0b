"""What a subsystem implements to take part in the one loop.

The order is: build the model, `Method.prepare`, `Engine.wrap`, `GradSync.attach`, optimizer, load a checkpoint's state;
then in every step forward and backward of each micro-batch, `GradSync.aggregate`, clipping, optimizer.
The plain implementations are `methods.Full`, `engines.Local` and `engines.NoSync`.
"""

from __future__ import annotations

from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any, Protocol

from torch import Tensor, nn


class Method(Protocol):
    """Which weights are trained, and in what shape."""

    def prepare(self, model: nn.Module) -> nn.Module:
        """Freezes and injects, in place; returns the model to train. Random draws come from torch's seeded stream."""
        ...

    def state(self, model: nn.Module) -> dict[str, Tensor]:
        """What a checkpoint must hold beside the base weights: references by name, not copies."""
        ...

    def load_state(self, model: nn.Module, state: dict[str, Tensor]) -> None:
        """Copies `state` into the model in place. ValueError where names or shapes are not those of `state(model)`."""
        ...

    def save(self, model: nn.Module, folder: Path, meta: dict[str, Any]) -> None:
        """Writes what a finished run leaves: safetensors, and `meta` as `weights.json`."""
        ...


class Engine(Protocol):
    """How the ranks of a run share the work."""

    rank: int
    world: int
    divisor: int
    """What the engine divides the sum of the ranks' gradients by: the world where it averages (DDP), else 1."""

    def wrap(self, model: nn.Module) -> nn.Module:
        """The module to call in the forward pass."""
        ...

    def accumulate(self, model: nn.Module, last: bool) -> AbstractContextManager[None]:
        """Around a micro-batch; gradients need not be exchanged before the `last` one of a step (`no_sync`)."""
        ...

    def backward(self, loss: Tensor) -> None:
        """Adds the gradient of `loss` to the parameters' `.grad`."""
        ...

    def clip(self, parameters: list[nn.Parameter], max_norm: float) -> Tensor:
        """Scales all gradients in place so that their norm is at most `max_norm` (0: never); returns it as it was."""
        ...

    def sum(self, value: float) -> float:
        """`value` summed over the ranks."""
        ...


class GradSync(Protocol):
    """How gradients are made equal on all ranks, where the engine leaves that to us."""

    def attach(self, model: nn.Module) -> None:
        """Registers the hooks or buffers it needs; called once, after the engine has wrapped the model."""
        ...

    def aggregate(self, model: nn.Module) -> None:
        """After the last micro-batch, before clipping: makes each `.grad`, in place, the aggregate over the ranks."""
        ...
