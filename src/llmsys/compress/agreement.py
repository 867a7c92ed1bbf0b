"""Ranks notice at once that they do not have the same, instead of waiting for each other for ever."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping

import torch
import torch.distributed as dist

from llmsys.compress.transfer import Group


def check_equal(texts: Mapping[str, str], group: Group, device: torch.device, wrong: str = "") -> None:
    """ValueError, on every rank of `group`, where one of `texts`, by what it describes, is not the same on all, or
    where a rank says what is `wrong` with its own: it tells the others before it goes. Collective: one all-reduce of
    two numbers a text."""
    if dist.is_initialized() and dist.get_world_size(group) > 1:
        _compare(texts, group, device, wrong)
    elif wrong:
        raise ValueError(wrong)


def _compare(texts: Mapping[str, str], group: Group, device: torch.device, wrong: str) -> None:
    hashes = [_hash(text) for text in texts.values()]
    both = torch.tensor([*hashes, *(-number for number in hashes), bool(wrong)], dtype=torch.int64, device=device)
    dist.all_reduce(both, dist.ReduceOp.MAX, group=group)
    *both_ways, refused = both.tolist()
    if refused:
        raise ValueError(wrong or "compress: another rank refuses to take part; its own error says why")
    for what, greatest, least in zip(texts, both_ways[: len(hashes)], both_ways[len(hashes) :], strict=True):
        if greatest != -least:
            raise ValueError(f"compress: the ranks do not have the same {what}; all of them have to")


def _hash(text: str) -> int:
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:7], "little")  # below 2**63, also negated
