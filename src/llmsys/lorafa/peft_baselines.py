"""LoRA and LoRA-FA on peft's layers: the baselines that our own are measured against.

LoRA (arXiv 2106.09685) adds to a frozen linear layer y = x W^T a product of two thin matrices,

    y = x W^T + (alpha / r) x A^T B^T        A [R, N], B [M, R], B = 0 at the start

and trains A and B. The gradient of A needs x [B, L, N], so x is stored; the gradient of B needs only x A^T [B, L, R].
LoRA-FA (arXiv 2308.03303, eq. 4) leaves A at its random start and trains B alone: x is not stored any more. peft's
own LoRA-FA is an optimizer; here A simply has no gradient, which any optimizer respects.

A classification head is new, so every method trains it in full.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from llmsys import schema
from llmsys.train.methods import Plain, copy_into

HEAD = "classifier"
PEFT_PREFIX = "base_model.model."
"""What peft's own files have before a module's name; with it `PeftModel.from_pretrained` reads ours."""


class LoRA(Plain):
    """LoRA by `peft.inject_adapter_in_model` on the linear layers named in `targets` (all of the blocks when empty)."""

    freeze_a = False

    def __init__(self, config: schema.Adapter) -> None:
        self.config = config
        self._targets: list[str] = []
        self._transposed = False

    def prepare(self, model: nn.Module, batches: Iterable[Mapping[str, Tensor]] = ()) -> nn.Module:
        """Injects the adapters in place and freezes all but them and the head. ValueError names unknown `targets`."""
        from peft import inject_adapter_in_model

        from llmsys.models.surgery import is_transposed, linear_names

        self._targets = linear_names(model, self.config.targets)
        self._transposed = any(is_transposed(model.get_submodule(name)) for name in self._targets)
        model.requires_grad_(False)
        inject_adapter_in_model(self._peft_config(), model)
        dtype = torch.float32 if self.config.dtype == "fp32" else next(model.parameters()).dtype  # of the embeddings
        for name, parameter in model.named_parameters():
            if _adapter(name):
                parameter.data = parameter.data.to(dtype)
            parameter.requires_grad_(_head(name) or "lora_B" in name or ("lora_A" in name and not self.freeze_a))
        return model

    def _peft_config(self) -> Any:
        from peft import LoraConfig

        return LoraConfig(
            r=self.config.r,
            lora_alpha=self.config.alpha,
            lora_dropout=self.config.dropout,
            target_modules=list(self._targets),
            fan_in_fan_out=self._transposed,
        )

    def state(self, model: nn.Module) -> dict[str, Tensor]:
        """Adapters, a frozen A included (it is random, not derivable from the base), and the head."""
        return {name: p for name, p in model.named_parameters() if _adapter(name) or _head(name)}

    def load_state(self, model: nn.Module, state: dict[str, Tensor]) -> None:
        copy_into(self.state(model), state)

    def save(self, state: dict[str, Tensor], folder: Path, meta: dict[str, Any]) -> None:
        """peft's own format, `adapter_model.safetensors` and `adapter_config.json`, with `meta` as `weights.json`."""
        from llmsys import tensors

        named = {PEFT_PREFIX + name.replace(".default", ""): tensor for name, tensor in state.items()}
        config = self._peft_config()
        config.inference_mode = True
        if any(_head(name) for name in state):
            config.modules_to_save = [HEAD]
        folder.mkdir(parents=True, exist_ok=True)
        tensors.save(named, folder / "adapter_model.safetensors")
        config.save_pretrained(folder)
        (folder / "weights.json").write_text(json.dumps({**meta, "format": "peft"}, indent=1), encoding="utf-8")


class LoRAFA(LoRA):
    """LoRA-FA: A stays at its random start and has no gradient."""

    freeze_a = True


def _adapter(name: str) -> bool:
    return ".lora_A." in name or ".lora_B." in name


def _head(name: str) -> bool:
    return name.split(".")[0] == HEAD
