"""Which layers of a model get an adapter."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.linear import NonDynamicallyQuantizableLinear

from llmsys.lorafa.config import LoRAFAConfig
from llmsys.lorafa.layer import Adapted
from llmsys.models.classes import is_patched
from llmsys.models.surgery import BLOCK, is_linear, is_transposed


def targets(model: nn.Module, config: LoRAFAConfig) -> dict[str, Any]:
    """Path -> linear layer, in the model's order, of every layer that gets an adapter.

    ValueError for a target that names no linear layer, and where none is named and the model has no blocks.
    """
    if any(hasattr(module, "lora_A") for module in model.modules()):
        raise ValueError("this model has adapters of peft: save and unload them there; from_peft reads what peft saved")
    linear = {path: module for path, module in model.named_modules() if is_linear(module)}
    inside = {path: module for path, module in linear.items() if BLOCK.search(path) and not _bypassed(module)}
    if not config.targets and not inside:
        raise ValueError(f"targets: no blocks are known in this model, so name layers; there are {_names(linear)}")
    chosen = set() if config.targets else set(inside)
    for target in config.targets:
        chosen |= _fitting(target, linear, inside) or _refuse(model, target, inside or linear)
    for path in chosen:
        check(model, path)
    return {path: layer for path, layer in linear.items() if path in chosen}


def check(model: nn.Module, path: str) -> None:
    """ValueError for a linear layer that cannot have an adapter."""
    layer: Any = model.get_submodule(path)
    if _bypassed(layer):
        raise ValueError(f"targets={path}: nn.MultiheadAttention reads its weight without calling it")
    if is_patched(layer):
        raise ValueError(f"targets={path}: its `forward` has been replaced on the object; an adapter would never run")
    parent = model.get_submodule(path.rpartition(".")[0])
    if isinstance(parent, nn.TransformerEncoderLayer) and torch.backends.mha.get_fastpath_enabled():
        raise ValueError(
            f"targets={path}: in evaluation nn.TransformerEncoderLayer reads its weight without calling it; "
            "torch.backends.mha.set_fastpath_enabled(False) makes it call it"
        )
    if type(layer.weight).__name__ in ("Params4bit", "Int8Params") and not hasattr(layer, "dequantised"):
        raise ValueError(f"targets={path}: is a {type(layer).__name__} of bitsandbytes' own; load with model.quant")


def check_width(layers: dict[str, Any], config: LoRAFAConfig) -> None:
    """ValueError where r exceeds a layer's width."""
    for path, layer in layers.items():
        outputs, inputs = shape(layer)
        if config.r > min(outputs, inputs):
            raise ValueError(f"r={config.r}: exceeds the width of {path}, which is {inputs} x {outputs}")


def adapted(model: nn.Module) -> Iterator[tuple[str, Any]]:
    """(path, layer) of every layer with adapters."""
    for path, module in model.named_modules():
        if isinstance(module, Adapted):
            yield path, module


def shape(layer: Any) -> tuple[int, int]:
    """(outputs, inputs) of a linear layer, quantised ones too."""
    if is_transposed(layer):
        return layer.nf, layer.nx  # its weight may be cut over ranks
    return layer.out_features, layer.in_features


def weight(layer: Any, dtype: Any) -> Tensor:
    """W [outputs, inputs] of any linear layer, quantised ones too."""
    if hasattr(layer, "dequantised"):
        whole: Tensor = layer.dequantised(dtype)
        return whole
    plain: Tensor = layer.weight.T if is_transposed(layer) else layer.weight
    return plain.to(dtype)


def _bypassed(module: nn.Module) -> bool:
    return isinstance(module, NonDynamicallyQuantizableLinear)


def _fitting(target: str, linear: dict[str, Any], inside: dict[str, Any]) -> set[str]:
    if target in linear:
        return {target}
    for among in (inside, linear):
        found = {path for path in among if path.endswith("." + target)}
        if found:
            return found
    return set()


def _refuse(model: nn.Module, target: str, there: dict[str, Any]) -> set[str]:
    """ValueError that says what `target` is, if anything."""
    for path, module in model.named_modules():
        if path == target or path.endswith("." + target):
            kind = type(module).__name__
            if isinstance(module, nn.Embedding):
                raise ValueError(
                    f"targets={target}: is an {kind}, which keeps token ids, not an input that a frozen A could save; "
                    "leave it out, or train it whole"
                )
            raise ValueError(f"targets={target}: is a {kind}; only linear layers take adapters: {_names(there)}")
    raise ValueError(f"targets={target}: names no linear layer; there are {_names(there)}")


def _names(linear: dict[str, Any]) -> str:
    return ", ".join(dict.fromkeys(path.rsplit(".", 1)[-1] for path in linear)) or "none"
