"""The tensors of a folder of safetensors, checked against a model before one is read."""

from __future__ import annotations

import json
import logging
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from llmsys import schema
from llmsys.models import published

FILE = "model.safetensors"
INDEX = "model.safetensors.index.json"
HEAD = "classifier."

log = logging.getLogger(__name__)


class Stored:
    """What the folder has for a model's parameters and statistics. Layers beyond `cfg.num_layers` are left out."""

    def __init__(self, model: nn.Module, folder: Path, cfg: schema.Model) -> None:
        """Reads names and shapes alone. A classifier may lack, and is new too, as the log says, where the file's has
        another number of classes. Raises ValueError naming keys that lack, that fit nothing, or whose shapes differ."""
        from safetensors import safe_open

        targets = _targets(model)
        self._model = cfg.name
        self._where: dict[str, list[tuple[Path, str]]] = {}
        self._open: dict[Path, Any] = {}
        unknown = []
        for file in files(folder):
            tensors = self._open[file] = safe_open(file, framework="pt")
            for key in tensors.keys():  # noqa: SIM118 - safe_open is no mapping
                name = published.own_name(key, cfg)
                if name is None:
                    continue
                if name not in targets:
                    unknown.append(key)
                    continue
                shape, (first, wanted) = tuple(tensors.get_slice(key).get_shape()), targets[name]
                if shape != wanted:
                    problem = f"{file}: {key} has shape {shape}, but model {cfg.name} wants"
                    if first.startswith(HEAD) and shape[1:] == wanted[1:]:
                        log.warning("%s %s: the head begins anew", problem, wanted)
                        continue
                    raise ValueError(f"{problem} {wanted}")
                self._where.setdefault(first, []).append((file, key))
        if unknown:
            raise ValueError(f"{folder}: keys that model {cfg.name} does not have: {_some(unknown)}")
        lacking = {first for first, _ in targets.values()} - self._where.keys()
        lacking = {name for name in lacking if not name.startswith(HEAD)}
        if lacking:
            raise ValueError(f"{folder}: keys that model {cfg.name} needs are missing: {_some(sorted(lacking))}")

    @torch.no_grad()
    def fill(self, name: str, target: Tensor) -> bool:
        """Copies what the folder has under `name` into `target`, in its dtype; False where there is nothing.

        Raises ValueError where two tensors that are one in this model differ in the file.
        """
        found = self._where.get(name)
        if found is None:
            return False
        (file, key), *others = found
        target.copy_(self._open[file].get_tensor(key))
        for file, key in others:
            if not torch.equal(self._open[file].get_tensor(key).to(target), target):
                raise ValueError(f"{file}: {key} is not {name}, to which model {self._model} ties it")
        return True

    def fill_buffers(self, model: nn.Module) -> None:
        """Those that are kept with the weights: batch norm's statistics."""
        for name, buffer in _kept(model).items():
            self.fill(name, buffer)


def files(folder: Path) -> list[Path]:
    """The folder's safetensors. ValueError where its index names one that is not there, or outside it."""
    if (folder / INDEX).is_file():
        index = json.loads((folder / INDEX).read_text(encoding="utf-8"))
        names = sorted(set(index["weight_map"].values()))
    else:
        names = [FILE]
    found = [folder / name for name in names]
    for name, file in zip(names, found, strict=True):
        if name != Path(name).name:
            raise ValueError(f"{folder / INDEX}: names a file outside its folder: {name}")
        if not file.is_file():
            raise ValueError(f"{file}: no such file, though {INDEX} names it")
    return found


def _targets(model: nn.Module) -> dict[str, tuple[str, tuple[int, ...]]]:
    """What a file fills: name -> (first name, shape) of every parameter, by each of its names, and of every buffer that
    is kept with the weights."""
    first = {parameter: name for name, parameter in model.named_parameters()}
    named = model.named_parameters(remove_duplicate=False)
    parameters = {name: (first[parameter], tuple(parameter.shape)) for name, parameter in named}
    return {**parameters, **{name: (name, tuple(buffer.shape)) for name, buffer in _kept(model).items()}}


def _kept(model: nn.Module) -> dict[str, Tensor]:
    kept = model.state_dict().keys()
    return {name: buffer for name, buffer in model.named_buffers() if name in kept}


def _some(names: list[str]) -> str:
    return ", ".join(names[:5]) + (f" and {len(names) - 5} more" if len(names) > 5 else "")
