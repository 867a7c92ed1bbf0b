"""One rank on one device: what every other engine is a change of, and is measured by."""

from __future__ import annotations

import contextlib
import math
from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager
from typing import Any

import torch
from torch import Tensor, nn

from llmsys import schema
from llmsys.comm import collectives
from llmsys.comm.place import Place
from llmsys.profile import memory
from llmsys.train.optimizer import keep, state_of
from llmsys.train.protocols import Fill, Make, SyncState, filled


class Local:
    """The plain `Engine`. Subclasses override what their sharing changes."""

    divisor = 1
    cuts_weights = False
    optimizer: torch.optim.Optimizer
    model: nn.Module
    trained: list[nn.Parameter]
    """As the engine has cut them. Kept, since walking over the modules costs half a millisecond for seven layers."""

    def __init__(self, config: schema.Config, place: Place, device: torch.device) -> None:
        self.config, self.device = config, device
        self.rank, self.world = place.rank, place.world
        self.data_rank, self.data_world = place.rank, place.world

    def wrap(self, model: nn.Module, make: Make, fill: Fill = filled) -> nn.Module:
        fill(model)
        self.model, self.optimizer = model, make(model)
        self.trained = [p for p in model.parameters() if p.requires_grad]
        return model

    def accumulate(self, last: bool) -> AbstractContextManager[None]:
        return contextlib.nullcontext()

    def backward(self, loss: Tensor) -> None:
        loss.backward()

    def step(self, sums: Tensor, max_norm: float) -> tuple[list[float], float]:
        gradients = self.gradients()
        norm = self.norm(gradients)
        if max_norm:
            # As torch's clip_grad_norm_ does, without a branch on the norm's value: that would wait for the device.
            torch._foreach_mul_(gradients, (max_norm / (norm + 1e-6)).clamp(max=1.0).to(torch.float32))
        # The one wait for the device in a step. Ranks decide alike, since all have the same sums and norm.
        *values, norm_value = torch.cat([self._total(sums.detach().double()), norm.double().reshape(1)]).tolist()
        if math.isfinite(values[0]) and math.isfinite(norm_value):
            self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        return values, norm_value

    def gradients(self) -> list[Tensor]:
        """This rank's part of every gradient; a parameter that no loss has reached has none."""
        return [local(p.grad) for p in self.trained if p.grad is not None]

    def norm(self, gradients: list[Tensor]) -> Tensor:
        """The L2 norm of the whole gradient, of which `gradients` are this rank's parts; on the device."""
        return nn.utils.get_total_norm(gradients)

    def sum(self, values: Tensor) -> Tensor:
        return self._total(values)  # on the host, by gloo, also where the model is on a GPU: nobody waits for that

    def _total(self, values: Tensor) -> Tensor:
        """`values` summed over the shares of the data, in place, wherever they are."""
        collectives.all_reduce(values)
        return values

    def settle(self) -> None:
        pass

    def full(self, tensor: Tensor) -> Tensor:
        return whole(tensor)

    def moments(self, parameter: nn.Parameter) -> dict[str, Tensor]:
        state = state_of(self.optimizer, parameter)
        return {key: whole(torch.as_tensor(value)) for key, value in state.items()}

    @torch.no_grad()
    def set_moments(self, moments: Mapping[nn.Parameter, Mapping[str, Tensor]]) -> None:
        """In the parameters' own precision, as torch's AdamW has moments, whatever engine wrote them; for an optimizer
        that keeps them in its own form, as they are."""
        own = hasattr(self.optimizer, "pack")
        for parameter, values in moments.items():
            state = self.optimizer.state[parameter] = {}
            for key, value in values.items():
                if key == "master":
                    parameter.copy_(like(parameter, value.to(parameter.dtype)))
                elif value.ndim:
                    state[key] = like(parameter, value if own else value.to(parameter.dtype))
                else:  # a step count stands where the fused kernel reads it: beside the parameter
                    state[key] = value.to(parameter.device, torch.float32)
            keep(self.optimizer, parameter)

    def held(self) -> dict[str, list[Tensor]]:
        return memory.held_locally(self.model, self.optimizer)


class NoSync:
    """The plain `GradSync`: nothing to exchange, or the engine does it by itself."""

    def attach(self, model: nn.Module) -> None:
        pass

    def aggregate(self, model: nn.Module) -> None:
        pass

    def state(self) -> SyncState:
        return {}, {}

    def load_state(self, states: Sequence[SyncState]) -> None:
        pass

    def held(self) -> list[Tensor]:
        return []


def local(tensor: Tensor) -> Tensor:
    """This rank's part of a DTensor, sharing its memory; any other tensor as it is."""
    found: Tensor = tensor.to_local() if hasattr(tensor, "to_local") else tensor
    return found.detach()


def whole(tensor: Tensor) -> Tensor:
    """All of a DTensor, gathered (collective); any other tensor as it is."""
    detached: Any = tensor.detach()
    found: Tensor = detached.full_tensor() if hasattr(detached, "full_tensor") else detached
    return found


def like(parameter: Any, value: Tensor) -> Tensor:
    """`value`, whole, in the shape in which `parameter` lies on the ranks; a copy, in the value's own precision."""
    value = value.to(parameter.device, copy=True)
    if not hasattr(parameter, "placements"):
        return value
    from torch.distributed.tensor import distribute_tensor

    # every rank has the value, so none needs to send it
    return distribute_tensor(value, parameter.device_mesh, parameter.placements, src_data_rank=None)
