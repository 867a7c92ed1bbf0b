"""What an adapter's file says of itself, and whether a model is the one that it is for.

The header of `adapter.safetensors` (`__metadata__`, key `adapter`) is a JSON object:

    format     1
    config     the fields of LoRAFAConfig
    layers     path -> {"shape": [outputs, inputs]}, with "a": 32 digits of the hash of the layer's A over all its draws
               (none where A is trained), or "shares": the path of the layer whose A it uses; and "bias": true where the
               adapter has one
    refreshed  how many times `refresh` has merged and redrawn
    modules    what was saved whole beside the adapter, a new head say
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from llmsys.lorafa import basis
from llmsys.lorafa.config import LoRAFAConfig
from llmsys.lorafa.layer import Adapter, is_seeded
from llmsys.lorafa.targets import check, check_width, is_linear, shape, targets

FORMAT = 1


class Layer(NamedTuple):
    """One adapted layer: (outputs, inputs), whose A it uses, the hash of that if its own and frozen, and its bias."""

    shape: tuple[int, int]
    first: str
    hash: str
    bias: bool


@dataclass(frozen=True, kw_only=True)
class Header:
    """See the module's docstring. `where` names the file in messages."""

    where: str
    config: LoRAFAConfig
    layers: dict[str, Layer]
    refreshed: int = 0
    modules: tuple[str, ...] = ()

    def text(self) -> str:
        layers: dict[str, Any] = {}
        for path, layer in self.layers.items():
            source = {"shares": layer.first} if layer.first != path else {"a": layer.hash} if layer.hash else {}
            layers[path] = {"shape": layer.shape, **source, **({"bias": True} if layer.bias else {})}
        rest = {"refreshed": self.refreshed, "modules": self.modules}
        return json.dumps({"format": FORMAT, "config": asdict(self.config), "layers": layers, **rest})

    def tensors(self) -> dict[str, tuple[int, ...]]:
        """Name -> shape of every tensor in the file but those of `modules`."""
        found: dict[str, tuple[int, ...]] = {}
        for path, ((outputs, inputs), first, _, bias) in self.layers.items():
            found[key(path, "B")] = (outputs, self.config.r)
            if self.refreshed:
                found[key(path, "past")] = (self.refreshed, outputs, self.config.r)
            if bias:
                found[key(path, "bias")] = (outputs,)
            if first == path and not is_seeded(self.config):
                found[key(path, "A")] = (self.config.r, inputs)
        return found

    def fitting(self, model: nn.Module) -> dict[str, Any]:
        """Path -> layer of `model`, which has exactly the file's; ValueError for another model."""
        there = dict(model.named_modules())
        for path, written in self.layers.items():
            layer: Any = there.get(path)
            if layer is None or not is_linear(layer):
                raise ValueError(f"{self.where}: is for another model: {path} is no linear layer of this one")
            if shape(layer) != written.shape:
                size = f"{written.shape[1]} x {written.shape[0]}, not {shape(layer)[1]} x {shape(layer)[0]}"
                raise ValueError(f"{self.where}: is for another model: {path} is {size}")
            check(model, path)
        further = [path for path in targets(model, self.config) if path not in self.layers]
        if further:
            raise ValueError(f"{self.where}: is for another model: it has nothing for {further[0]}")
        found = {path: there[path] for path in self.layers}
        check_width(found, self.config)
        return found

    def check(self, contents: Mapping[str, Tensor], model: nn.Module) -> None:
        """ValueError where `contents` are not the tensors that the header and `model` want."""
        wanted = self.tensors()
        there = dict(model.named_modules())
        for path in self.modules:
            if path not in there:
                raise ValueError(f"{self.where}: is for another model: it has {path}, which is no module of this one")
            wanted |= {f"{path}.{name}": tuple(p.shape) for name, p in there[path].named_parameters()}
        odd = sorted(wanted.keys() ^ contents.keys())
        if odd:
            raise ValueError(f"{self.where}: {'lacks' if odd[0] in wanted else 'has an unknown'} {odd[0]}")
        for name, expected in wanted.items():
            if tuple(contents[name].shape) != expected:
                raise ValueError(f"{self.where}: {name} has shape {tuple(contents[name].shape)}, not {expected}")

    def matrices(self, contents: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """A of each layer that has its own, drawn (for the first time) or from `contents`; ValueError where it is not
        the one of the file's training."""
        config, found = self.config, {}
        for path, layer in self.layers.items():
            if layer.first != path:
                continue
            if is_seeded(config):
                same = _digest(config, (config.r, layer.shape[1]), path, self.refreshed) == layer.hash
                found[path] = basis.draw(config.init, config.r, layer.shape[1], config.seed, path)
            else:
                found[path] = contents[key(path, "A")]
                same = config.train_a or basis.fingerprint(found[path])[:32] == layer.hash
            if not same:
                raise ValueError(f"{self.where}: A of {path} is not the one it was trained with: the hashes differ")
        return found


def parse(text: str, where: str) -> Header:
    """The header of a file; ValueError naming the file `where` where it is none, or of another format."""
    try:
        plain = json.loads(text)
        if plain["format"] != FORMAT:
            raise ValueError(f"{where}: has format {plain['format']}; this llmsys reads {FORMAT}")
        layers = {
            path: Layer(tuple(one["shape"]), one.get("shares", path), one.get("a", ""), one.get("bias", False))
            for path, one in plain["layers"].items()
        }
        unknown = sorted(plain["config"].keys() - {field.name for field in fields(LoRAFAConfig)})
        config = {name: value for name, value in plain["config"].items() if name not in unknown}
        refreshed, modules = int(plain["refreshed"]), tuple(plain["modules"])
        shared = {layer.first for layer in layers.values()} - layers.keys()
        odd = [
            path for path, layer in layers.items() if not shared and not _fits(layer, layers[layer.first], layer.first)
        ]
    except (json.JSONDecodeError, KeyError, TypeError, AttributeError) as error:
        raise ValueError(f"{where}: damaged, or no adapter of llmsys: {type(error).__name__} {error}") from error
    if unknown or shared:
        raise ValueError(f"{where}: this llmsys knows no {', '.join([*unknown, *sorted(shared)])}")
    if odd:
        raise ValueError(f"{where}: damaged: {odd[0]} cannot share the A of {layers[odd[0]].first}")
    try:
        made = LoRAFAConfig(**config)
    except (TypeError, ValueError) as error:
        raise ValueError(f"{where}: {error}") from error
    return Header(where=where, config=made, layers=layers, refreshed=refreshed, modules=modules)


def _fits(layer: Layer, owner: Layer, path: str) -> bool:
    """Whether the owner of a layer's A, at `path`, has one of its own, and reads as much as the layer."""
    return owner.first == path and owner.shape[1] == layer.shape[1]


def digest(adapter: Adapter, path: str) -> str:
    """32 digits of the hash over all draws of an adapter's A, "" of a trained one. ValueError where a seeded A is not
    what it was drawn as."""
    config, a, epoch = adapter.config, adapter.a.detach(), len(adapter.past)
    if not adapter.seeded:
        return "" if config.train_a else basis.fingerprint(a)[:32]
    if adapter.owner.path != path:
        raise ValueError(f"{path} was {adapter.owner.path} when its A was drawn: save the model that inject was given")
    r, n = a.shape
    last = (config.init, r, n, config.seed, adapter.owner.path, epoch)
    if a.dtype == torch.float16:  # which lacks bf16's smallest numbers
        same = torch.equal(a.cpu(), basis.draw(*last).half())
    else:
        same = basis.fingerprint(a) == basis.recipe(*last)
    if not same:
        raise ValueError(f"A of {path} is not what seed={config.seed} gives: something has written into it")
    return _digest(config, (r, n), adapter.owner.path, epoch)


def _digest(config: LoRAFAConfig, a: tuple[int, int], path: str, refreshed: int) -> str:
    draws = [basis.recipe(config.init, *a, config.seed, path, epoch) for epoch in range(refreshed + 1)]
    return (draws[0] if not refreshed else hashlib.sha256("".join(draws).encode()).hexdigest())[:32]


def key(path: str, name: str) -> str:
    """`path.name`; of a model that is itself the layer, `name`."""
    return f"{path}{'.' * bool(path)}{name}"
