"""The plain `Method`: every weight is trained. Also what all methods share: copying a named state into a model."""

from __future__ import annotations

import logging
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from llmsys.models import quant

log = logging.getLogger(__name__)


class Plain:
    """What methods have in common that leave the model's own forward pass as it is."""

    reads_weights = True

    def recompute(self, model: nn.Module, policies: Sequence[str]) -> None:
        from llmsys.models import recompute_blocks

        other = set(policies) - {"none", "block"}
        if other:
            raise ValueError(f"train.recompute={other.pop()}: needs method=lora or method=lorafa")
        if "block" in policies:
            recompute_blocks(model, [policy == "block" for policy in policies])


class Full(Plain):
    """Full fine-tuning, or pre-training: everything has a gradient and optimizer state.

    But for quantised layers, which are frozen: over such a base embeddings, norms and the head are trained, and no
    linear weight of a block. The log says so, and the record's `linear_weights_trained` is 0.
    """

    reads_weights = False

    def prepare(self, model: nn.Module, batches: Iterable[Mapping[str, Tensor]] = ()) -> nn.Module:
        frozen = 0
        for module in model.modules():
            packed = quant.is_quantised(module)
            frozen += packed
            for parameter in module.parameters(recurse=False):
                parameter.requires_grad_(not packed)
        if frozen:
            log.info("method=full over a quantised base: %d linear layers are frozen, only the rest is trained", frozen)
        return model

    def state(self, model: nn.Module) -> dict[str, Tensor]:
        return {**trainable(model), **running(model)}

    def load_state(self, model: nn.Module, state: dict[str, Tensor]) -> None:
        copy_into(self.state(model), state)

    def save(self, state: dict[str, Tensor], folder: Path, meta: dict[str, Any]) -> None:
        from llmsys.models import weights

        weights.save(state, folder, meta)


def trainable(model: nn.Module) -> dict[str, nn.Parameter]:
    """The parameters that are trained, by name; one that is used twice (tied embeddings) once."""
    return {name: p for name, p in model.named_parameters() if p.requires_grad}


def running(model: nn.Module) -> dict[str, Tensor]:
    """The buffers that training changes, by name: batch norm's statistics. Others are not persistent."""
    kept = model.state_dict().keys()
    return {name: buffer for name, buffer in model.named_buffers() if name in kept}


@torch.no_grad()
def copy_into(target: Mapping[str, Tensor], source: Mapping[str, Tensor]) -> None:
    """Copies `source` into the tensors of `target`, in place. ValueError where names or shapes differ."""
    fit(target, source)
    for name, tensor in target.items():
        tensor.copy_(source[name])


def fit(target: Mapping[str, Tensor], source: Mapping[str, Tensor]) -> None:
    """ValueError where names or shapes differ."""
    if target.keys() != source.keys():
        odd = sorted(target.keys() ^ source.keys())
        raise ValueError(f"the state does not fit the model: {len(odd)} names differ, e.g. {odd[0]}")
    for name, tensor in target.items():
        if tensor.shape != source[name].shape:
            raise ValueError(f"{name}: has shape {tuple(tensor.shape)}, the state {tuple(source[name].shape)}")
