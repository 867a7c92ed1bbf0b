"""Transformers' blocks as chains of pieces, by family."""

from __future__ import annotations

import importlib
from collections.abc import Sequence

from torch import nn

from llmsys.lorafa.blocks.block import POLICIES, Fused, fuse

FAMILIES = {"LlamaDecoderLayer": "llama:LlamaBlock"}
"""Class name of a block -> where its chains are."""


def fuse_blocks(model: nn.Module, policies: str | Sequence[str]) -> int:
    """Puts every block of a known family onto chains, in place; returns how many."""
    from llmsys.models.surgery import blocks, recompute_blocks

    each = [policies] * len(blocks(model)) if isinstance(policies, str) else policies
    unknown = set(each) - set(POLICIES)
    if unknown:
        raise ValueError(f"recompute={unknown.pop()}: must be one of {', '.join(POLICIES)}")
    if "block" in each:
        recompute_blocks(model, [policy == "block" for policy in each])
    found = 0
    for (_, block), policy in zip(blocks(model), each, strict=True):
        name = next((cls.__name__ for cls in type(block).__mro__ if cls.__name__ in FAMILIES), None)
        if name is not None:
            module, _, mixin = FAMILIES[name].partition(":")
            kind: type[Fused] = getattr(importlib.import_module(f"llmsys.lorafa.blocks.{module}"), mixin)
            fuse(block, kind, policy)
            found += 1
    return found
