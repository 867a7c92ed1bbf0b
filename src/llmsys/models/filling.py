"""The parameters of a model on the meta device get their values, module by module, where they will live.

So nothing needs the whole model in one place. A layer that will be packed into 4 bits is filled, packed, and freed
before the next one is; an engine that cuts weights over ranks has a block filled, cuts it, and goes on to the next
(`train.protocols.Engine.wrap`). Each parameter's value depends on its own name alone (a generator of its own, a file, a
checkpoint), so the order does not matter.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import torch
from torch import Tensor, nn

from llmsys import schema
from llmsys.models.initialise import fill_buffers, initialise
from llmsys.models.stored import Stored


class Filler:
    """`filler(module)` gives every parameter below `module` that is still on the meta device memory and its value."""

    def __init__(
        self, model: nn.Module, cfg: schema.Model, *, seed: int, device: torch.device, folder: Path | None
    ) -> None:
        """Fills the buffers of `model` at once; they are small. Parameters come from the safetensors in `folder`, or at
        random from `seed` where it is None. Raises what `Stored` does, before any parameter is filled."""
        self._cfg, self._seed, self._device = cfg, seed, device
        self._names: dict[Tensor, str] = {}
        names: dict[Tensor, set[str]] = {}
        for name, parameter in model.named_parameters(remove_duplicate=False):
            self._names.setdefault(parameter, name)
            names.setdefault(parameter, set()).add(name)
        self._tied: dict[Tensor, nn.Parameter | None] = {p: None for p, found in names.items() if len(found) > 1}
        self._stored = Stored(model, folder, cfg) if folder else None
        self._state: Mapping[str, Tensor] = {}
        fill_buffers(model, device)
        if self._stored:
            self._stored.fill_buffers(model)

    def prefer(self, state: Mapping[str, Tensor]) -> None:
        """Takes the values of the parameters that `state` names from there, a checkpoint. ValueError where it names one
        that the model does not have, or that is filled by now."""
        odd = sorted(state.keys() - self._names.values())
        if odd:
            raise ValueError(f"the state does not fit the model: {len(odd)} names differ, e.g. {odd[0]}")
        self._state = state

    @torch.no_grad()
    def __call__(self, module: nn.Module) -> None:
        for owner in module.modules():
            for leaf, parameter in owner.named_parameters(recurse=False):
                if parameter.is_meta:
                    setattr(owner, leaf, self._filled(parameter, owner))

    def _filled(self, meta: nn.Parameter, owner: nn.Module) -> nn.Parameter:
        tied = self._tied.get(meta)
        if tied is not None:
            return tied
        name = self._names[meta]
        made = nn.Parameter(torch.empty_like(meta, device=self._device), requires_grad=meta.requires_grad)
        if name in self._state:
            made.copy_(self._state[name])
        elif self._stored is None or not self._stored.fill(name, made):
            initialise(made, name, owner, self._cfg, self._seed)
        if meta in self._tied:
            self._tied[meta] = made
        return made
