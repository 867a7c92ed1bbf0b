"""LoRA and LoRA-FA as methods of the one training loop (`method=lora`, `method=lorafa`).

A classification head is new, so it is trained in full, as by every method.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from llmsys import schema
from llmsys.lorafa.blocks import fuse_blocks
from llmsys.lorafa.config import LoRAFAConfig
from llmsys.lorafa.injection import inject
from llmsys.train.methods import copy_into, running, trainable

HEAD = "classifier"


class LoRAFA:
    """`lorafa`: A is frozen; `lora`: it is trained. Everything else is the same code."""

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
        """Injects the adapters in place and freezes all but them and the head. ValueError names unknown `targets`."""
        inject(model, self.config, batches=batches if self.config.init == "pca" else None)
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

    def save(self, state: dict[str, Tensor], folder: Path, meta: dict[str, Any]) -> None:
        raise NotImplementedError
