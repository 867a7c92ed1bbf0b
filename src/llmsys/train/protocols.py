"""What a subsystem implements to take part in the one loop.

The order is: build the model, `Method.prepare` and `recompute`, load a checkpoint's weights, `Engine.wrap` (with the
optimizer), `GradSync.attach`, load the optimizer's state; then in every step forward and backward of each micro-batch,
`GradSync.aggregate`, `Engine.step`. The plain implementations are `methods.Full`, `engines.local.Local` and `NoSync`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor, nn

Make = Callable[[nn.Module], torch.optim.Optimizer]
"""Builds the optimizer of a model's trained parameters."""
Fill = Callable[[nn.Module], None]
"""Gives the parameters of a module their values (`models.filling`)."""


def filled(module: nn.Module) -> None:
    """What fills a model that has all its values."""


class Method(Protocol):
    """Which weights are trained, and in what shape."""

    reads_weights: bool
    """Whether `prepare` looks at the values of the weights. Where not, an engine may cut each weight as it is filled,
    and the whole model is nowhere."""

    def prepare(self, model: nn.Module, batches: Iterable[Mapping[str, Tensor]]) -> nn.Module:
        """Freezes and injects, in place; returns the model to train. Random draws come from torch's seeded stream.

        `batches`: some of the training data, the same on all ranks and on the model's device, for methods that look
        at it; made as it is iterated.
        """
        ...

    def recompute(self, model: nn.Module, policies: Sequence[str]) -> None:
        """Makes each block compute again in the backward pass what its policy says (`schema.recompute`), in place.
        ValueError for a policy that the method or the model does not have."""
        ...

    def state(self, model: nn.Module) -> dict[str, Tensor]:
        """What a checkpoint must hold beside the base weights: references by name, not copies."""
        ...

    def load_state(self, model: nn.Module, state: dict[str, Tensor]) -> None:
        """Copies `state` into the model in place. ValueError where names or shapes are not those of `state(model)`."""
        ...

    def save(self, state: dict[str, Tensor], folder: Path, meta: dict[str, Any]) -> None:
        """Writes what a finished run leaves of `state(model)`, whole: safetensors, and `meta` as `weights.json`."""
        ...


class Engine(Protocol):
    """How the ranks of a run share the work. Where "collective" is written, all ranks have to call."""

    rank: int
    world: int
    data_rank: int
    """Which of the `data_world` shares of the global batch this rank trains on."""
    data_world: int
    divisor: int
    """What the engine divides the sum of the ranks' gradients by: the world where it averages (DDP), else 1."""
    optimizer: torch.optim.Optimizer
    """torch's optimizer, whose groups' `lr` the loop sets; there from `wrap` on."""

    cuts_weights: bool
    """Whether a rank holds a part of each weight: then `wrap` is given a model that is not filled, where it can be."""

    def wrap(self, model: nn.Module, make: Make, fill: Fill = filled) -> nn.Module:
        """Takes over `model`, changing its parameters in place where they are cut over ranks; returns the module to
        call in the forward pass. `make` builds the optimizer of a model: an engine that cuts weights calls it after.
        `fill(module)` gives the parameters of a module their values where they have none yet (`models.filling`)."""
        ...

    def accumulate(self, last: bool) -> AbstractContextManager[None]:
        """Around a micro-batch; gradients need not be exchanged before the `last` one of a step (`no_sync`)."""
        ...

    def backward(self, loss: Tensor) -> None:
        """Adds the gradient of `loss` to the parameters' own."""
        ...

    def step(self, sums: Tensor, max_norm: float) -> tuple[list[float], float]:
        """One update of the weights, from gradients scaled in place to a norm of at most `max_norm` (0: as they are).

        Returns `sums` [N] (device), of which the first is the loss, summed over the shares of the data, and the norm of
        the whole gradient as it was. Where loss or norm is not finite, no weight and no moment has changed. The
        gradients are gone afterwards. Collective.
        """
        ...

    def sum(self, values: Tensor) -> Tensor:
        """`values` (fp64 [N], host) summed over the shares of the data. Collective."""
        ...

    def settle(self) -> None:
        """Puts parameters back as they lie between steps; before they are named, after forward passes. Collective."""
        ...

    def full(self, tensor: Tensor) -> Tensor:
        """A parameter or buffer of the wrapped model, whole and in its own precision or better. Collective."""
        ...

    def moments(self, parameter: nn.Parameter) -> dict[str, Tensor]:
        """The optimizer's state of one parameter, whole (`step`, `exp_avg`, ...); {} before the first step.
        Collective."""
        ...

    def set_moments(self, moments: Mapping[nn.Parameter, Mapping[str, Tensor]]) -> None:
        """Puts what `moments` gave, and where it has a `master` the weights in full precision, in place. Collective."""
        ...

    def held(self) -> dict[str, list[Tensor]]:
        """This rank's own tensors by kind: weights, gradients (meta tensors of their size), optimizer, master."""
        ...


SyncState = tuple[Mapping[str, Tensor], Mapping[str, Any]]
"""What a gradient synchroniser keeps on one rank: tensors and plain values, which JSON has."""


class GradSync(Protocol):
    """How gradients are made equal on all ranks, where the engine leaves that to us."""

    def attach(self, model: nn.Module) -> None:
        """Registers the hooks or buffers it needs; called once, after the engine has wrapped the model."""
        ...

    def aggregate(self, model: nn.Module) -> None:
        """After the last micro-batch, before clipping: makes each `.grad`, in place, the aggregate over the ranks."""
        ...

    def state(self) -> SyncState:
        """What this rank keeps from step to step, for a checkpoint: references by name, and plain values. Both empty
        where nothing is kept; plain values are there wherever something may be."""
        ...

    def load_state(self, states: Sequence[SyncState]) -> None:
        """Goes on from what `state` gave on each of the ranks that there were, in their order; reads what it needs of
        it. ValueError for the state of another model."""
        ...

    def held(self) -> list[Tensor]:
        """This rank's own tensors of it."""
        ...
