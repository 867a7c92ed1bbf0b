"""Transformers' blocks as chains of pieces, by family."""

from __future__ import annotations

import importlib
import logging
from collections.abc import Sequence
from typing import Any

from torch import nn

from llmsys.lorafa.blocks.block import POLICIES, WITHIN, Fused, fuse

log = logging.getLogger(__name__)

FAMILIES = {
    "LlamaDecoderLayer": "llama:LlamaBlock",
    "MistralDecoderLayer": "llama:LlamaBlock",
    "Qwen2DecoderLayer": "llama:LlamaBlock",
    "Qwen3DecoderLayer": "llama:LlamaBlock",
    "BertLayer": "bert:BertBlock",
    "RobertaLayer": "bert:BertBlock",
    "XLMRobertaLayer": "bert:BertBlock",
    "CamembertLayer": "bert:BertBlock",
    "ElectraLayer": "bert:BertBlock",
    "T5Block": "t5:T5Block",
    "MT5Block": "t5:T5Block",
}
"""Class name of a block -> where its chains are."""


def fuse_blocks(model: nn.Module, policies: str | Sequence[str]) -> int:
    """Puts every block of a known family onto chains, in place; returns how many.

    `policies`: one of `POLICIES` for all blocks, or one for each (T5: the encoder's, then the decoder's). A block of
    another family keeps its own forward pass, which one line in the log says. ValueError as `check_policies`.
    """
    from llmsys.models.surgery import recompute_blocks

    found = check_policies(model, policies)
    if any(policy == "block" for _, _, policy in found):
        recompute_blocks(model, [policy == "block" for _, _, policy in found])
    for block, family, policy in found:
        if getattr(block, "gradient_checkpointing", False) and policy != "block":
            block.gradient_checkpointing = False  # type: ignore[assignment]  # a flag of GradientCheckpointingLayer
        if family is not None:
            module, _, mixin = family.partition(":")
            kind: type[Fused] = getattr(importlib.import_module(f"llmsys.lorafa.blocks.{module}"), mixin)
            fuse(block, kind, policy)
    others = sorted({type(block).__name__ for block, family, _ in found if family is None})
    if others or not found:
        names = ", ".join(others) or "no family"
        log.warning("blocks of %s keep their own forward pass: only their adapted layers save", names)
    return sum(family is not None for _, family, _ in found)


def check_policies(model: nn.Module, policies: str | Sequence[str]) -> list[tuple[nn.Module, str | None, str]]:
    """Every block of `model` with where its chains are, None where its family has none, and its policy.

    ValueError for an unknown policy, as many as there are no blocks, or one that the model does not have: `mlp` and
    `attn+mlp` cut within a block, so its family has to be known.
    """
    from llmsys.models.surgery import blocks

    found = [block for _, block in blocks(model)]
    each = [policies] * max(len(found), 1) if isinstance(policies, str) else list(policies)
    unknown = next((policy for policy in each if policy not in POLICIES), None)
    if unknown is not None:
        raise ValueError(f"recompute={unknown}: must be one of {', '.join(POLICIES)}")
    families = [_family(block) for block in found]
    cut = next((p for p, family in zip(each, families or [None], strict=False) if p in WITHIN and family is None), None)
    if cut is not None:
        raise ValueError(
            f"recompute={cut}: is for blocks of {', '.join(FAMILIES)}, and {type(model).__name__} has others"
        )
    if found and len(each) != len(found):
        raise ValueError(f"recompute: names {len(each)} blocks, and {type(model).__name__} has {len(found)}")
    return list(zip(found, families, each, strict=False))


def _family(block: Any) -> str | None:
    return next((FAMILIES[cls.__name__] for cls in type(block).__mro__ if cls.__name__ in FAMILIES), None)
