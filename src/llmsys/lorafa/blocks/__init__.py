"""Transformers' blocks as chains of pieces, by family."""

from __future__ import annotations

import importlib
import logging
from collections.abc import Sequence
from typing import Any

from torch import nn

from llmsys.lorafa.blocks.block import Fused, fuse
from llmsys.lorafa.blocks.checkpointing import follow
from llmsys.models.classes import is_patched, refuse_patched
from llmsys.schema import recompute
from llmsys.schema.recompute import POLICIES, WITHIN

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
"""Class name of a block -> where its chains are. It has to be transformers' own class, with layers of libraries'
classes in it: what somebody has derived from them computes something else."""

LIBRARIES = ("transformers", "torch", "llmsys", "bitsandbytes")


def fuse_blocks(model: nn.Module, policies: str | Sequence[str]) -> int:
    """Puts every block of a known family onto chains, in place; returns how many.

    `policies`: one of `POLICIES` for all blocks, or one for each (T5: the encoder's, then the decoder's), also as text
    with counts, `mlp:8,none:24`. A block of another family keeps its own forward pass, which one line in the log says.
    ValueError as `check_policies`.
    """
    found = check_policies(model, policies)
    follow(model, [(block, policy == "block") for block, _, policy in found])
    for block, family, policy in found:
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
    `attn+mlp` cut within a block, so its family has to be known, and `block` is transformers' own doing.
    """
    from llmsys.models.surgery import blocks

    found = [block for _, block in blocks(model)]
    each = list(policies)
    if isinstance(policies, str):
        each = recompute.policies(policies, max(len(found), 1), key="recompute")
    unknown = next((policy for policy in each if policy not in POLICIES), None)
    if unknown is not None:
        raise ValueError(f"recompute={unknown}: must be one of {', '.join(POLICIES)}")
    families = [_family(block) for block in found]
    cut = next((p for p, family in zip(each, families or [None], strict=False) if p in WITHIN and family is None), None)
    if cut is not None:
        raise ValueError(
            f"recompute={cut}: is for blocks of {', '.join(FAMILIES)}, and {type(model).__name__} has others"
        )
    if (
        "block" in each
        and found
        and not any(getattr(m, "supports_gradient_checkpointing", False) for m in model.modules())
    ):
        raise ValueError(f"recompute=block: is for transformers, and {type(model).__name__} is none")
    if found and len(each) != len(found):
        raise ValueError(f"recompute: names {len(each)} blocks, and {type(model).__name__} has {len(found)}")
    return list(zip(found, families, each, strict=False))


def _family(block: Any) -> str | None:
    kind = type(block)
    if isinstance(block, Fused):  # and wrapped by FSDP2, perhaps
        return next(FAMILIES[cls.__name__] for cls in kind.__mro__ if cls.__name__ in FAMILIES)
    if kind.__name__ not in FAMILIES or not kind.__module__.startswith("transformers.models."):
        return None
    refuse_patched(block)
    parts = (part for part in block.modules() if part is not block and (part._parameters or part._modules))
    usual = (type(part).__module__.split(".")[0] in LIBRARIES and not is_patched(part) for part in parts)
    return FAMILIES[kind.__name__] if all(usual) else None
