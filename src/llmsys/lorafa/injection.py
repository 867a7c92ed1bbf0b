"""Puts adapters into a model, and its blocks onto chains of pieces, in place."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from llmsys.lorafa import basis
from llmsys.lorafa.adapters import changeable, check_name, disabled, names, plain, set_adapter
from llmsys.lorafa.config import SEEDED, LoRAFAConfig
from llmsys.lorafa.layer import Adapter, adapt, device
from llmsys.lorafa.targets import adapted, check_width, shape, targets, weight
from llmsys.models.classes import become

GROUPS = (
    ("q_proj", "k_proj", "v_proj"),
    ("gate_proj", "up_proj"),
    ("query", "key", "value"),
    ("q", "k", "v"),
    ("wi_0", "wi_1"),
)
"""Names of layers that read the same input, where they are children of one module."""


def inject(
    model: nn.Module,
    config: LoRAFAConfig,
    name: str = "default",
    batches: Iterable[Any] | None = None,
) -> nn.Module:
    """Adapters named `name` beside the layers that `config.targets` name; returns `model`, changed in place.

    With the first adapters all parameters but theirs are frozen: what else shall be trained, a new head say, is for the
    caller to unfreeze. Called again with another name it adds adapters, which are then the active ones. `batches`, for
    `init=pca`: the arguments of forward passes, each a mapping of keywords, a tuple, or one tensor, on any device.
    ValueError for a target that names no linear layer, an r that exceeds a layer's width, or a name taken.
    """
    changeable(model, "inject")
    inner = plain(model)
    check_name(inner, name)
    layers = targets(inner, config)
    first = {path: _first(path, layers) if config.share_a else path for path in layers}
    check_width(layers, config)
    if config.bias != "none" and all(layer.bias is None for layer in layers.values()):
        raise ValueError(f"bias={config.bias}: no layer in targets has a bias")
    own = {path: layer for path, layer in layers.items() if first[path] == path}
    trained = layers if config.bias != "none" else {}
    biases = {path: layer.bias for path, layer in trained.items() if layer.bias is not None}
    attach(inner, config, name, first, _matrices(inner, own, config, batches), biases)
    return model


def attach(
    model: nn.Module,
    config: LoRAFAConfig,
    name: str,
    first: Mapping[str, str],
    matrices: Mapping[str, Tensor],
    biases: Mapping[str, Tensor],
) -> None:
    """Adapters beside the layers whose paths are the keys of `first`, in place; then they are the active ones.

    `first`: the path of the layer whose A a layer uses, its own mostly. `matrices`: A of each of those, on the host,
    copied. `biases`: what the bias of an adapter that trains one starts as, copied.
    """
    from llmsys.lorafa.blocks import check_policies

    check_policies(model, config.recompute)  # says no, if it does, while nothing has changed
    layers = {path: model.get_submodule(path) for path in first}
    made: dict[str, Adapter] = {}  # all of them first, as there may be no memory for the last
    for path in sorted(layers, key=lambda path: first[path] != path):  # those that have an A before those that share it
        layer: Any = layers[path]
        owner = None if first[path] == path else made[first[path]]
        dtype = _b_dtype(layer, config)
        kept = _dtype(layer) if config.init != "given" else dtype
        a = matrices[path].to(device(layer), kept, copy=True) if owner is None else None
        made[path] = Adapter(config, path, a, shape(layer)[0], dtype, shared=owner, bias=biases.get(path))
    if not names(model):
        model.requires_grad_(False)
    for path, adapter in made.items():
        adapt(layers[path]).adapters[name] = adapter
    set_adapter(model, name)


def _first(path: str, layers: Mapping[str, Any]) -> str:
    """The first of the layers that read what `path` reads."""
    parent, _, own = path.rpartition(".")
    group: tuple[str, ...] = next((group for group in GROUPS if own in group), (own,))
    if "EncDecAttention" in parent:  # whose query reads the decoder
        group = tuple(other for other in group if (other == "q") == (own == "q"))
    return next(other for other in (f"{parent}{'.' * bool(parent)}{sibling}" for sibling in group) if other in layers)


def _matrices(
    model: nn.Module, layers: Mapping[str, Any], config: LoRAFAConfig, batches: Iterable[Any] | None
) -> dict[str, Tensor]:
    """A of every layer, on the host."""
    if config.init in SEEDED:
        return {path: basis.draw(config.init, config.r, shape(x)[1], config.seed, path) for path, x in layers.items()}
    if config.init == "weight_svd":
        away = next((path for path, layer in layers.items() if layer.weight.is_meta), None)
        if away is not None:
            raise ValueError(f"init=weight_svd: the weight of {away} is not here: accelerate has offloaded it")
        wide = torch.float32
        return {path: basis.weight_svd(weight(x, wide), config.r, config.seed) for path, x in layers.items()}
    if config.init == "given":
        raise ValueError("init=given: is for adapters that load_adapter and from_peft read from a file")
    if batches is None:
        raise ValueError("init=pca: needs `batches` to see the layers' inputs")
    return _principal(model, layers, config, batches)


def _principal(
    model: nn.Module, layers: Mapping[str, Any], config: LoRAFAConfig, batches: Iterable[Any]
) -> dict[str, Tensor]:
    """A from the layers' inputs in forward passes of the base model, in evaluation mode."""
    seen = {path: basis.Covariance(config.r, shape(layer)[1], config.seed) for path, layer in layers.items()}

    def watch(path: str) -> Any:
        return lambda module, args: seen[path].add(args[0])

    home = device(next(iter(layers.values())))
    hooks = [layer.register_forward_pre_hook(watch(path)) for path, layer in layers.items()]
    modes = {module: module.training for module in model.modules()}
    model.eval()
    try:
        with torch.no_grad(), disabled(adapted(model)), _unfused(model):
            for batch in batches:
                _call(model, batch, home)
    finally:
        for module, mode in modes.items():
            module.training = mode
        for hook in hooks:
            hook.remove()
    found = {}
    for path, covariance in seen.items():
        try:
            found[path] = covariance.a()
        except ValueError as error:
            raise ValueError(f"{error}: {path}") from None
    return found


@contextmanager
def _unfused(model: nn.Module) -> Iterator[None]:
    """In this context blocks call their layers one by one, so that hooks see the inputs."""
    from llmsys.lorafa.blocks.block import Fused, plain_class

    fused = [(module, type(module)) for module in model.modules() if isinstance(module, Fused)]
    try:
        for module, kind in fused:
            become(module, plain_class(kind))
        yield
    finally:
        for module, kind in fused:
            become(module, kind)


def _call(model: nn.Module, batch: Any, device: torch.device) -> None:
    def moved(value: Any) -> Any:
        return value.to(device) if isinstance(value, Tensor) else value

    if isinstance(batch, Mapping):
        model(**{key: moved(value) for key, value in batch.items()})
    else:
        model(*map(moved, batch if isinstance(batch, tuple | list) else (batch,)))


def _dtype(layer: Any) -> torch.dtype:
    """A's: the weight's, or where that is packed bits bf16, which has all of A's entries."""
    dtype: torch.dtype = layer.weight.dtype
    return dtype if dtype.is_floating_point else torch.bfloat16


def _b_dtype(layer: Any, config: LoRAFAConfig) -> torch.dtype:
    return torch.float32 if config.dtype == "fp32" else _dtype(layer)
