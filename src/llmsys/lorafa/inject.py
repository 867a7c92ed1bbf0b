"""Puts adapters into a model, and its blocks onto chains of pieces, in place."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from llmsys.lorafa import basis
from llmsys.lorafa.config import SEEDED, LoRAFAConfig
from llmsys.lorafa.layer import Adapted, Adapter, adapt

GROUPS: tuple[tuple[str, ...], ...] = (
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
    batches: Iterable[Mapping[str, Tensor]] | None = None,
) -> nn.Module:
    """Adapters named `name` beside the layers that `config.targets` name; returns `model`, changed in place.

    All its parameters are frozen but the adapters' (and biases, where `config.bias` says so): what else shall be
    trained, a new head say, is for the caller to unfreeze. `batches`: keyword arguments of forward passes, for
    `init=pca`. ValueError for a target that names no linear layer, an r that exceeds a layer's width, or a name taken.
    """
    from llmsys.lorafa.blocks import fuse_blocks

    layers = targets(model, config)
    for path, layer in layers.items():
        outputs, inputs = shape(layer)
        if config.r > min(outputs, inputs):
            raise ValueError(f"r={config.r}: exceeds the width of {path}, which is {inputs} x {outputs}")
        if isinstance(layer, Adapted) and name in layer.adapters:
            raise ValueError(f"name={name}: there is an adapter of this name already")
    found = _matrices(model, layers, config, batches)
    model.requires_grad_(False)
    for path, layer in layers.items():
        first = _first(path, layers) if config.share_a else path
        owner = None if first == path else layers[first].adapters[name]
        outputs, _ = shape(layer)
        a = found[path].to(layer.weight.device, _dtype(layer)) if owner is None else None
        adapt(layer).adapters[name] = Adapter(config, a, outputs, _b_dtype(layer, config), shared=owner)
        layer.active = name
        if config.bias == "lora_only" and layer.bias is not None:
            layer.bias.requires_grad_(True)
    ignored = [path for path, buffer in model.named_buffers() if path.endswith((".A", ".inverse"))]
    model._ddp_params_and_buffers_to_ignore = ignored  # type: ignore[assignment]  # what DDP reads
    fuse_blocks(model, config.recompute)
    return model


def targets(model: nn.Module, config: LoRAFAConfig) -> dict[str, Any]:
    """Path -> linear layer, in the model's order, of every layer that gets an adapter."""
    from llmsys.models.surgery import linear_names

    return {path: model.get_submodule(path) for path in linear_names(model, list(config.targets))}


def adapted(model: nn.Module) -> Iterator[tuple[str, Any]]:
    """(path, layer) of every layer with adapters."""
    for path, module in model.named_modules():
        if isinstance(module, Adapted):
            yield path, module


def shape(layer: Any) -> tuple[int, int]:
    """(outputs, inputs) of a linear layer, quantised ones too."""
    from llmsys.models.surgery import is_transposed

    if is_transposed(layer):
        return layer.weight.shape[1], layer.weight.shape[0]
    return layer.out_features, layer.in_features


def _first(path: str, layers: Mapping[str, Any]) -> str:
    """The first of the layers that read what `path` reads."""
    parent, _, own = path.rpartition(".")
    group = next((names for names in GROUPS if own in names), (own,))
    if "EncDecAttention" in parent:  # whose query reads the decoder
        group = tuple(other for other in group if (other == "q") == (own == "q"))
    return next(other for other in (f"{parent}.{sibling}" for sibling in group) if other in layers)


def _matrices(
    model: nn.Module, layers: Mapping[str, Any], config: LoRAFAConfig, batches: Iterable[Mapping[str, Tensor]] | None
) -> dict[str, Tensor]:
    """A of every layer, on the host."""
    if config.init in SEEDED:
        return {path: basis.draw(config.init, config.r, shape(x)[1], config.seed, path) for path, x in layers.items()}
    if config.init == "weight_svd":
        return {path: basis.weight_svd(_weight(layer), config.r, config.seed) for path, layer in layers.items()}
    if batches is None:
        raise ValueError("init=pca: needs `batches` to see the layers' inputs")
    seen = {path: basis.Covariance(config.r, shape(layer)[1], config.seed) for path, layer in layers.items()}

    def watch(path: str) -> Any:
        return lambda module, args: seen[path].add(args[0])

    hooks = [layer.register_forward_pre_hook(watch(path)) for path, layer in layers.items()]
    training = model.training
    model.eval()
    try:
        with torch.no_grad():
            for batch in batches:
                model(**batch)
    finally:
        model.train(training)
        for hook in hooks:
            hook.remove()
    return {path: covariance.a() for path, covariance in seen.items()}


def _weight(layer: Any) -> Tensor:
    from llmsys.models.surgery import is_transposed

    if hasattr(layer, "dequantised"):
        weight: Tensor = layer.dequantised(torch.float32)
        return weight
    return layer.weight.T if is_transposed(layer) else layer.weight


def _dtype(layer: Any) -> torch.dtype:
    """A's: the weight's, or where that is packed bits bf16, which has all of A's entries."""
    dtype: torch.dtype = layer.weight.dtype
    return dtype if dtype.is_floating_point else torch.bfloat16


def _b_dtype(layer: Any, config: LoRAFAConfig) -> torch.dtype:
    return torch.float32 if config.dtype == "fp32" else _dtype(layer)
