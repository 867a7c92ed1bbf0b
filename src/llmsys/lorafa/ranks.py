"""A on several ranks: each draws it for itself, nobody sends it, and once at the start it is compared.

DDP copies rank 0's buffers to all ranks at every forward pass. For A that would be traffic for nothing, and it would
hide a rank that drew another A for as long as that rank only reads: the first merge or saved file would then differ.
"""

from __future__ import annotations

import hashlib

import torch
import torch.distributed as dist
from torch import Tensor, nn

from llmsys.comm import collectives
from llmsys.lorafa import basis
from llmsys.lorafa.targets import adapted

IGNORED = "_ddp_params_and_buffers_to_ignore"
"""Where DDP looks, in the module it is given, for names that it shall not touch."""


def ignore_in_ddp(model: nn.Module) -> None:
    """Tells DDP to leave every frozen A of `model` alone, in place; other names that are there stay.

    DDP reads it of the module that it wraps: call this for an outer module, if the model becomes a part of one.
    """
    ours = {
        f"{path}{'.' * bool(path)}adapters.{name}.{what}"
        for path, layer in adapted(model)
        for name, adapter in layer.adapters.items()
        for what, _ in adapter.named_buffers()
    }
    theirs = [name for name in getattr(model, IGNORED, ()) if ".adapters." not in f".{name}"]
    setattr(model, IGNORED, [*theirs, *sorted(ours)])


def assert_same_across_ranks(model: nn.Module) -> None:
    """ValueError, on every rank, that names the first layer whose frozen A is not the same on all. Collective.

    Compared are 8 bytes of each fingerprint. Without a process group there is nothing to compare.
    """
    frozen = {
        f"{path} ({name})": adapter.a
        for path, layer in adapted(model)
        for name, adapter in layer.adapters.items()
        if adapter.owner is adapter and not adapter.config.train_a
    }
    if collectives.world() == 1:
        return
    names = hashlib.sha256("\n".join(frozen).encode()).hexdigest()
    if not _same(_digests([names])).all():
        raise ValueError("the ranks have adapters of other names, or beside other layers")
    if not frozen:
        return
    differs = ~_same(_digests([basis.fingerprint(a) for a in frozen.values()]))
    if differs.any():
        first = list(frozen)[int(differs.nonzero()[0])]
        raise ValueError(f"A of {first} is not the same on all ranks: {int(differs.sum())} of {len(frozen)} differ")


def _digests(hashes: list[str]) -> Tensor:
    device = "cuda" if "nccl" in str(dist.get_backend()) else "cpu"
    return torch.tensor([int(text[:15], 16) for text in hashes], device=device)


def _same(own: Tensor) -> Tensor:
    """[N] of what is equal on all ranks."""
    gathered = collectives.all_gather(own)
    return (gathered == gathered[:1]).all(0).cpu()
