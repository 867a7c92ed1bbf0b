"""The active adapter as a part of the weights: y = x (W + s B A)^T costs what y = x W^T does.

W + s B A is computed in fp32 and rounded once to W's dtype. What rounding has taken cannot be subtracted back: of a
bf16 weight 0.5 that gained 1e-4, nothing tells that it was not 0.5. So to come back to the original bits, these are
kept, on the host: as many bytes as the adapted weights have, 13 GB for all linear layers of LLaMA-7B in bf16.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from llmsys.lorafa.adapters import plain
from llmsys.lorafa.targets import adapted, is_transposed


class Merged(NamedTuple):
    """What a merged layer was, on the host: its weight, where it was kept, and the bias that the adapter replaced."""

    weight: Tensor | None
    bias: Tensor | None


@torch.no_grad()
def merge(model: nn.Module, *, keep: bool = True) -> nn.Module:
    """W <- W + s B A of the active adapter in every layer that has it, in place; returns `model`.

    No adapter runs until `unmerge`, and none can be trained, added or chosen; the adapter is still there to be saved.
    `keep`: whether the original weights are, for `unmerge` (see above). ValueError where nothing is active or it is
    merged already, and for weights that are quantised, shared with another layer, or cut over ranks.
    """
    layers = {path: layer for path, layer in adapted(plain(model)) if layer.chosen is not None}
    if any(layer.merged is not None for layer in layers.values()):
        raise ValueError("merge: the model is merged already")
    if not layers:
        raise ValueError("merge: no adapter is active; inject one, or set_adapter")
    refuse_unmergeable(plain(model), layers, "merge")
    for layer in layers.values():
        adapter = layer.chosen
        bias = None if layer.bias is None else layer.bias.detach().cpu().clone()
        layer.merged = Merged(layer.weight.detach().cpu().clone() if keep else None, bias)
        add(layer, adapter.delta())
        if adapter.bias is not None:
            _set_bias(layer, adapter.bias)
    return model


@torch.no_grad()
def unmerge(model: nn.Module) -> nn.Module:
    """The weights' original bits again, in place, and the adapter beside them; returns `model`.

    ValueError for a model that is not merged, or whose weights were not kept.
    """
    layers = [layer for _, layer in adapted(plain(model)) if layer.merged is not None]
    if not layers:
        raise ValueError("unmerge: the model is not merged")
    if any(layer.merged.weight is None for layer in layers):
        raise ValueError("unmerge: merge(keep=False) has not kept the original weights")
    for layer in layers:
        layer.weight.copy_(layer.merged.weight)
        _set_bias(layer, layer.merged.bias)
        layer.merged = None
    return model


def base_bias(layer: Any) -> Tensor | None:
    """The bias of a layer without its adapter, merged or not."""
    found: Tensor | None = layer.bias if layer.merged is None else layer.merged.bias
    return found


def _set_bias(layer: Any, bias: Tensor | None) -> None:
    if bias is None:
        layer.bias = None
    elif layer.bias is None:
        layer.bias = nn.Parameter(bias.to(layer.weight), requires_grad=False)
    else:
        layer.bias.copy_(bias)


def add(layer: Any, delta: Tensor) -> None:
    """W <- W + delta [M, N] (fp32, fp64), in place; summed in the wider of their dtypes and rounded once."""
    whole = delta.T if is_transposed(layer) else delta
    wide = torch.promote_types(layer.weight.dtype, delta.dtype)
    layer.weight.copy_(layer.weight.to(wide) + whole)


def refuse_unmergeable(model: nn.Module, layers: Mapping[str, Any], what: str) -> None:
    """ValueError for weights into which nothing can be added here."""
    homes: dict[int, list[str]] = {}
    for path, parameter in model.named_parameters(remove_duplicate=False):
        homes.setdefault(id(parameter), []).append(path)
    for path, layer in layers.items():
        if hasattr(layer, "dequantised"):
            raise ValueError(f"{what}: {path} is quantised; rounding it anew would lose most of what was learnt")
        if layer.weight.is_meta:
            raise ValueError(f"{what}: the weight of {path} is not here: accelerate has offloaded it")
        if is_cut(layer.weight):
            raise ValueError(f"{what}: the weight of {path} is cut over ranks; do it before the engine, or after")
        shared = [other for other in homes[id(layer.weight)] if other != f"{path}{'.' * bool(path)}weight"]
        if shared:
            raise ValueError(f"{what}: the weight of {path} is also {shared[0]}, which would change with it")


def is_cut(tensor: Any) -> bool:
    """Whether this rank has only a part of a parameter: DeepSpeed's ZeRO-3, or a DTensor of FSDP2."""
    return hasattr(tensor, "ds_id") or hasattr(tensor, "_local_tensor")
