"""What the cost tests measure with: a model prepared as a method would, saved-tensor hooks, a FLOP counter."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode, sdpa_backward_flop_count, sdpa_flop_count

from llmsys import schema
from llmsys.models import linear_names, load, recompute_blocks

CLASSES = 5
LOCAL = schema.Engine()
FULL = schema.Method(kind="full")


def shape(**changes: Any) -> schema.Model:
    """A model small enough to run and large enough that four-byte scalars do not matter."""
    small = {"family": "llama", "vocab_size": 700, "hidden_size": 64, "intermediate_size": 176, "num_layers": 3}
    return schema.Model(**{**small, **changes})


def training(**changes: Any) -> schema.Train:
    """Two sequences of 96 tokens."""
    return schema.Train(**{"micro_batch": 2, "global_batch": 2, "length": 96, **changes})


def method(kind: str, **changes: Any) -> schema.Method:
    return FULL if kind == "full" else schema.Adapter(kind=kind, **changes)


def build(model: schema.Model, train: schema.Train, how: schema.Method) -> nn.Module:
    """The model with peft's adapters, A frozen for LoRA-FA, and recomputation."""
    built = load(
        model,
        objective="classification" if model.family == "bert" else "causal_lm",
        num_labels=CLASSES,
        device=torch.device("cpu"),
        seed=0,
        folder=None,
    )
    if isinstance(how, schema.Adapter):
        from peft import LoraConfig, inject_adapter_in_model

        config = LoraConfig(
            r=how.r, lora_alpha=how.alpha, lora_dropout=how.dropout, target_modules=linear_names(built, how.targets)
        )
        built = inject_adapter_in_model(config, built)
        for name, parameter in built.named_parameters():
            if "lora_" in name and how.dtype == "fp32":
                parameter.data = parameter.data.float()
            if "lora_A" in name and how.kind == "lorafa_peft":
                parameter.requires_grad_(False)
            if name.startswith("classifier."):
                parameter.requires_grad_(True)
    if train.recompute == "block":
        recompute_blocks(built)
    return built.train()


def batch(model: schema.Model, train: schema.Train, padded: bool) -> dict[str, torch.Tensor]:
    ids = torch.randint(0, 300, (train.micro_batch, train.length))
    labels = ids if model.family == "llama" else torch.zeros(train.micro_batch, dtype=torch.long)
    result = {"input_ids": ids, "labels": labels}
    if padded:
        result["attention_mask"] = torch.ones_like(ids)
        result["attention_mask"][0, -16:] = 0
    return result


def autocast(model: schema.Model, train: schema.Train) -> torch.autocast:
    on = train.precision == "bf16" and model.dtype == "fp32"
    return torch.autocast("cpu", torch.bfloat16, enabled=on)


def saved_bytes(built: nn.Module, inputs: dict[str, torch.Tensor], context: torch.autocast) -> int:
    """Bytes of all storages that autograd keeps in one forward, each once, parameters and buffers not."""
    own = {t.untyped_storage().data_ptr() for t in [*built.parameters(), *built.buffers()]}
    found: dict[int, int] = {}
    alive = []  # a freed storage's address would be given out again

    def pack(tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        alive.append(tensor)
        if storage.data_ptr() not in own:
            found[storage.data_ptr()] = storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor), context:
        built(**inputs)
    return sum(found.values())


def _forward(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, *_: Any, **__: Any) -> int:
    return sdpa_flop_count(q.shape, k.shape, v.shape)


def _backward(g: torch.Tensor, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, *_: Any, **__: Any) -> int:
    return sdpa_backward_flop_count(g.shape, q.shape, k.shape, v.shape)


_forward._get_raw = _backward._get_raw = True  # type: ignore[attr-defined]


def counted_flops(built: nn.Module, inputs: dict[str, torch.Tensor], context: torch.autocast) -> int:
    """FLOPs of forward and backward by torch's counter, which is taught the CPU's fused attention."""
    ops = torch.ops.aten
    mapping = {
        ops._scaled_dot_product_flash_attention_for_cpu: _forward,
        ops._scaled_dot_product_flash_attention_for_cpu_backward: _backward,
    }
    with FlopCounterMode(display=False, custom_mapping=mapping) as counter:
        with context:
            loss = built(**inputs).loss
        loss.backward()
    return counter.get_total_flops()
