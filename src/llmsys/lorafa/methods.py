"""LoRA and LoRA-FA as methods of the one training loop (`method=lora`, `method=lorafa`).

A classification head is new, so it is trained in full, as by every method.

On several ranks every rank draws A for itself, and their hashes are compared before training begins. An A that is
computed from data or weights is sent by rank 0: another processor sums in another order, and where a number lies
between two of bf16 that is another A.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from llmsys import schema
from llmsys.comm import collectives
from llmsys.lorafa import ranks, store
from llmsys.lorafa.blocks import fuse_blocks
from llmsys.lorafa.config import SEEDED, LoRAFAConfig
from llmsys.lorafa.injection import inject
from llmsys.lorafa.targets import adapted
from llmsys.train.methods import copy_into, running, trainable

HEAD = "classifier"


class LoRAFA:
    """`lorafa`: A is frozen; `lora`: it is trained. Everything else is the same code."""

    reads_weights = True

    def __init__(self, config: schema.LoRA, seed: int = 0) -> None:
        self.config = LoRAFAConfig(
            r=config.r,
            alpha=config.alpha,
            targets=tuple(config.targets),
            dropout=config.dropout,
            init=config.init,
            share_a=config.share_a,
            seed=seed,
            correction=config.correction,
            bias=config.bias,
            dtype=config.dtype,
            train_a=config.train_a,
        )

    def prepare(self, model: nn.Module, batches: Iterable[Mapping[str, Tensor]] = ()) -> nn.Module:
        """Injects the adapters in place and freezes all but them and the head. Collective.

        ValueError names unknown `targets`, and a layer whose frozen A is not the same on all ranks.
        """
        inject(model, self.config, batches=batches if self.config.init == "pca" else None)
        if self.config.init not in SEEDED:
            for _, layer in adapted(model):
                for tensor in (layer.adapter.a.detach(), *layer.adapter.buffers()):
                    collectives.broadcast(tensor)
        ranks.assert_same_across_ranks(model)
        self._model = model
        for name, parameter in model.named_parameters():
            if name.split(".")[0] == HEAD:
                parameter.requires_grad_(True)
        return model

    def recompute(self, model: nn.Module, policies: Sequence[str]) -> None:
        fuse_blocks(model, policies)

    def state(self, model: nn.Module) -> dict[str, Tensor]:
        """What is trained, and an A that no seed gives again."""
        return {**trainable(model), **running(model)}

    def load_state(self, model: nn.Module, state: dict[str, Tensor]) -> None:
        copy_into(self.state(model), state)
        for _, layer in adapted(model):
            layer.adapter.follow()

    def save(self, state: dict[str, Tensor], folder: Path, meta: dict[str, Any]) -> None:
        """`adapter.safetensors`, which `load_adapter` puts beside the base model, and `meta` as `weights.json`."""
        heads = [name for name, _ in self._model.named_children() if name == HEAD]
        store.save_adapter(self._model, folder, modules=heads, state=state)
        (folder / "weights.json").write_text(json.dumps({**meta, "format": "lorafa"}, indent=1), encoding="utf-8")
