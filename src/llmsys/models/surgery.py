"""Find the layers of a model by name. What is done to them is the business of methods and engines."""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Any

from torch import nn

BLOCK = re.compile(r"(?:^|\.)(?:layers?|h|block)\.\d+(?=\.|$)")
"""Up to the end of a block's name; its leftmost match, since T5 and ResNet have a `layer.0` inside their blocks.

`model.layers.3` (llama), `bert.encoder.layer.3`, `transformer.h.3` (gpt2), `encoder.block.3` (t5),
`resnet.encoder.stages.0.layers.3`, `stages.0.layers.3` (vgg).
"""


def blocks(model: nn.Module) -> list[tuple[str, nn.Module]]:
    """(name, module) of the repeated blocks in the order of the model: a transformer's layers (T5: the encoder's, then
    the decoder's), a ResNet's residual blocks, VGG's convolutions."""
    found = []
    for name, module in model.named_modules():
        match = BLOCK.search(name)
        if match and match.end() == len(name):
            found.append((name, module))
    return found


def linear_names(model: nn.Module, targets: list[str]) -> list[str]:
    """Full names, in the model's order, of the linear layers in the blocks whose last part is in `targets`.

    All of them when `targets` is empty; never the head (`lm_head`, `classifier`). GPT-2's are transformers' `Conv1D`, a
    linear layer whose weight is stored transposed. A target may name more of the path to tell layers of one last name
    apart (bert's `attention.output.dense` and `output.dense`). Raises ValueError with the names that exist when a
    target fits no layer, or the blocks have no linear layer.
    """
    found = [name for name, module in model.named_modules() if is_linear(module) and BLOCK.search(name)]
    if not found:
        raise ValueError("method.targets: this model has no linear layer in its blocks")
    for target in targets:
        if not any(_fits(name, target) for name in found):
            there = ", ".join(dict.fromkeys(name.rsplit(".", 1)[-1] for name in found))
            raise ValueError(f"method.targets={target}: no such linear layer in the blocks; there are {there}")
    if not targets:
        return found
    return [name for name in found if any(_fits(name, target) for target in targets)]


def is_linear(module: nn.Module) -> bool:
    """`nn.Linear` (and what derives from it), or transformers' Conv1D, told by its name to import nothing heavy."""
    return isinstance(module, nn.Linear) or is_transposed(module)


def is_transposed(module: nn.Module) -> bool:
    """Whether a linear layer keeps its weight as [inputs, outputs]."""
    return any(cls.__name__ == "Conv1D" for cls in type(module).__mro__)


def _fits(name: str, target: str) -> bool:
    return name == target or name.endswith("." + target)


def recompute_blocks(model: nn.Module, which: Sequence[bool] | None = None) -> None:
    """Makes blocks keep only their input and compute the rest again in the backward pass (`train.recompute=block`).

    `which` of the model's blocks; None means all.

    Not re-entrant: so it composes with saved-tensor hooks and DDP, and needs no input that requires a gradient. That is
    why the hook by which transformers makes a frozen embedding's output require one is taken out again: with it the
    first block would compute, and keep, gradients that nobody reads. ValueError for a model that is no transformer.
    """
    found = blocks(model)
    names = {name for name, _ in found}
    able = (module for module in model.modules() if getattr(module, "supports_gradient_checkpointing", False))
    transformer: Any = next(able, None)
    if transformer is None:
        raise ValueError("train.recompute=block: is for transformers, and this model is none")
    kwargs = {"use_reentrant": False}
    if hasattr(transformer, "activation_checkpointing_enable"):  # the name from transformers 5.2x on
        transformer.activation_checkpointing_enable(activation_checkpointing_kwargs=kwargs)
    else:
        transformer.gradient_checkpointing_enable(gradient_checkpointing_kwargs=kwargs)
    transformer.disable_input_require_grads()
    for name, module in model.named_modules():
        # T5's attention would ask for the gradient of cross-attention's zero bias, as re-entrant checkpoints need it;
        # with it no fused kernel can serve.
        if name not in names and BLOCK.search(name) and hasattr(module, "gradient_checkpointing"):
            module.gradient_checkpointing = False
    for (_, block), chosen in zip(found, which or [True] * len(found), strict=True):
        block.gradient_checkpointing = chosen  # type: ignore[assignment]  # a flag of GradientCheckpointingLayer
