"""Several adapters beside one base: which of them runs, none for a while, and taking them off again.

An adapter's A is a buffer, so nothing here can unfreeze it; B (and what else an adapter trains) has a gradient while it
is the active one.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Any

from torch import nn
from torch.nn.parallel import DistributedDataParallel

from llmsys.lorafa.layer import restore
from llmsys.lorafa.ranks import ignore_in_ddp
from llmsys.lorafa.targets import adapted


def names(model: nn.Module) -> list[str]:
    """The names of the adapters that `model` has."""
    return list(dict.fromkeys(name for _, layer in adapted(model) for name in layer.adapters))


def set_adapter(model: nn.Module, name: str) -> None:
    """Makes `name` the adapter that runs and is trained, in place, under its own `recompute`.

    Its B's require gradients, those of the others do not. ValueError for an unknown name, a merged model, and one that
    is wrapped in DDP, which decides at its construction which gradients it exchanges.
    """
    from llmsys.lorafa.blocks import fuse_blocks

    changeable(model, "set_adapter")
    layers = having(model, name)
    fuse_blocks(plain(model), next(iter(layers.values())).adapters[name].config.recompute)
    for _, layer in adapted(model):
        layer.active = name
        for other, adapter in layer.adapters.items():
            adapter.requires_grad_(other == name)
    ignore_in_ddp(plain(model))


@contextmanager
def disable_adapter(model: nn.Module) -> Iterator[nn.Module]:
    """In this context the base model runs alone, as the reference of DPO (arXiv 2305.18290) does.

    Nothing but what runs is changed: gradients are required of what they were before, and A stays A. ValueError for a
    merged model, and after `refresh`, when the base is no longer what it was.
    """
    layers = list(adapted(model))
    _unmerged(layers, "disable_adapter")
    _unrefreshed(layers, "disable_adapter")
    with disabled(layers):
        yield model


@contextmanager
def disabled(layers: Iterable[tuple[str, Any]]) -> Iterator[None]:
    """No adapter of `layers` runs in this context."""
    before = [(layer, layer.active) for _, layer in layers]
    try:
        for layer, _ in before:
            layer.active = None
        yield
    finally:
        for layer, active in before:
            layer.active = active


def delete_adapter(model: nn.Module, name: str) -> None:
    """Takes the adapter `name` off, in place. If it was the active one, none is until `set_adapter`.

    With the last adapter the layers and blocks become what they were, still frozen. ValueError as of `set_adapter`, and
    for a refreshed adapter, whose past is part of the weights.
    """
    changeable(model, "delete_adapter")
    for layer in having(model, name).values():
        del layer.adapters[name]
        if not layer.adapters:
            restore(layer)
    for _, layer in adapted(model):
        layer.active = None if layer.active == name else layer.active
    if not names(model):
        _bare(plain(model))
    ignore_in_ddp(plain(model))


def unload(model: nn.Module) -> nn.Module:
    """Takes all adapters off, in place, and returns `model`; what is merged stays in the weights.

    So `unload(merge(model, keep=False))` is a plain model that has learnt. Its parameters are still frozen. ValueError
    for a refreshed adapter that is not merged: the base would be neither the old one nor the trained.
    """
    _unwrapped(model, "unload")
    layers = list(adapted(model))
    if any(layer.merged is None for _, layer in layers):
        _unrefreshed(layers, "unload")
    for _, layer in layers:
        restore(layer)
    _bare(plain(model))
    ignore_in_ddp(plain(model))
    return model


def plain(model: nn.Module) -> nn.Module:
    """The model inside what torch.compile and DDP wrap around it."""
    while True:
        if isinstance(model, DistributedDataParallel):
            model = model.module
        elif isinstance(inner := getattr(model, "_orig_mod", None), nn.Module):
            model = inner
        else:
            return model


def having(model: nn.Module, name: str) -> dict[str, Any]:
    """Path -> layer that has an adapter `name`, named as in the model inside its wraps; ValueError where none has."""
    found = {path: layer for path, layer in adapted(plain(model)) if name in layer.adapters}
    if not found:
        there = ", ".join(names(model)) or "none"
        raise ValueError(f"name={name}: there is no adapter of this name; there are {there}")
    return found


def check_name(model: nn.Module, name: str) -> None:
    """ValueError for a name that is taken, or that no module can have."""
    if name in names(model):
        raise ValueError(f"name={name}: there is an adapter of this name already")
    if not name or "." in name or hasattr(nn.ModuleDict, name):
        raise ValueError(f"name={name}: is none that an adapter can have; letters and digits will do")


def changeable(model: nn.Module, what: str) -> None:
    """ValueError where adapters cannot be added, chosen or taken off now."""
    layers = list(adapted(model))
    _unmerged(layers, what)
    _unwrapped(model, what)
    if what in ("inject", "delete_adapter"):
        _unrefreshed(layers, what)


def _unwrapped(model: nn.Module, what: str) -> None:
    from llmsys.lorafa.blocks.block import is_wrapped

    if what in ("unload", "delete_adapter") and any(map(is_wrapped, model.modules())):
        raise ValueError(f"{what}: blocks have been wrapped, by FSDP2 perhaps, which cannot be undone; load them anew")
    if any(isinstance(module, DistributedDataParallel) for module in model.modules()):
        raise ValueError(f"{what}: comes before the model is wrapped in DDP, which would not know the new gradients")


def _unmerged(layers: list[tuple[str, Any]], what: str) -> None:
    if any(layer.merged is not None for _, layer in layers):
        raise ValueError(f"{what}: the adapter is merged into the weights; unmerge the model first")


def _unrefreshed(layers: list[tuple[str, Any]], what: str) -> None:
    if any(adapter.past for _, layer in layers for adapter in layer.adapters.values()):
        raise ValueError(f"{what}: refresh has merged into the weights, which are no longer the base's; reload them")


def _bare(model: nn.Module) -> None:
    """Gives all blocks their own forward passes back, in place, and what they were told to compute again."""
    from llmsys.lorafa.blocks.block import unfuse
    from llmsys.lorafa.blocks.checkpointing import give_back

    for module in model.modules():
        unfuse(module)
    give_back(model)
