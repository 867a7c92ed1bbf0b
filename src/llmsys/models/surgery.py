"""Find the layers of a model by name. What is done to them is the business of methods and engines."""

from __future__ import annotations

import re
from typing import Any

from torch import nn

BLOCK = re.compile(r"(?:^|\.)layers?\.\d+\.")
"""A name inside a transformer block: `model.layers.3.…` (llama), `bert.encoder.layer.3.…` (bert)."""


def linear_names(model: nn.Module, targets: list[str]) -> list[str]:
    """Full names, in the model's order, of the `nn.Linear` in the blocks whose last part is in `targets`.

    All of them when `targets` is empty; never the head (`lm_head`, `classifier`). A target may name more of the path to
    tell layers of one last name apart (bert's `attention.output.dense` and `output.dense`). Raises ValueError with the
    names that exist when a target fits no layer.
    """
    found = [name for name, module in model.named_modules() if isinstance(module, nn.Linear) and BLOCK.search(name)]
    for target in targets:
        if not any(_fits(name, target) for name in found):
            there = ", ".join(dict.fromkeys(name.rsplit(".", 1)[-1] for name in found))
            raise ValueError(f"method.targets={target}: no such linear layer in the blocks; there are {there}")
    if not targets:
        return found
    return [name for name in found if any(_fits(name, target) for target in targets)]


def _fits(name: str, target: str) -> bool:
    return name == target or name.endswith("." + target)


def recompute_blocks(model: nn.Module) -> None:
    """Makes every block keep only its input and compute the rest again in the backward pass (`train.recompute=block`).

    Not re-entrant: so it composes with saved-tensor hooks and DDP, and needs no input that requires a gradient. That is
    why the hook by which transformers makes a frozen embedding's output require one is taken out again: with it the
    first block would compute, and keep, gradients that nobody reads.
    """
    transformer: Any = next(module for module in model.modules() if hasattr(module, "enable_input_require_grads"))
    kwargs = {"use_reentrant": False}
    if hasattr(transformer, "activation_checkpointing_enable"):  # the name from transformers 5.2x on
        transformer.activation_checkpointing_enable(activation_checkpointing_kwargs=kwargs)
    else:
        transformer.gradient_checkpointing_enable(gradient_checkpointing_kwargs=kwargs)
    transformer.disable_input_require_grads()
