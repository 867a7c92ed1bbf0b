"""What the cost tests measure with: a model prepared as a method would, saved-tensor hooks, a FLOP counter."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode, sdpa_backward_flop_count, sdpa_flop_count

from llmsys import schema, wiring
from llmsys.cost import Case
from llmsys.models import blocks, load
from llmsys.profile.memory import saved_tensors
from llmsys.schema import recompute
from llmsys.schema.model import CONVNETS

CLASSES = 5
LOCAL = schema.Engine()
FULL = schema.Method(kind="full")


SMALL = {"hidden_size": 64, "num_layers": 3, "vocab_size": 700}
SHAPES: dict[str, dict[str, Any]] = {
    "llama": {**SMALL, "intermediate_size": 176},
    "gpt2": {**SMALL, "intermediate_size": 256, "tie_embeddings": True},
    "bert": {**SMALL, "intermediate_size": 176},
    "roberta": {**SMALL, "intermediate_size": 176},
    "t5": {**SMALL, "intermediate_size": 192, "tie_embeddings": True},
    "resnet": {"depths": [1, 2], "widths": [16, 32]},
    "vgg": {"depths": [1, 2], "widths": [16, 32], "block": "plain"},
}


def shape(family: str = "llama", **changes: Any) -> Any:
    """A model small enough to run and large enough that four-byte scalars do not matter."""
    small = {**SHAPES[family], **changes}
    if family in CONVNETS:
        return schema.ConvNet(kind="convnet", family=family, num_classes=CLASSES, **small)
    return schema.Transformer(family=family, **small)


def training(**changes: Any) -> schema.Train:
    """Two sequences of 96 tokens, or two images."""
    return schema.Train(**{"micro_batch": 2, "global_batch": 2, "length": 96, "target_length": 40, **changes})


def case(model: schema.Model, train: schema.Train, how: schema.Method, **facts: Any) -> Case:
    return Case(model, train, how, facts.pop("engine", LOCAL), num_labels=CLASSES, **facts)


def method(kind: str, **changes: Any) -> schema.Method:
    """`changes` are an adapter's settings, of which `full` has none."""
    made: schema.Method = FULL if kind == "full" else schema.SCHEMAS["method"][kind](kind=kind, **changes)
    return made


def build(model: schema.Model, train: schema.Train, how: schema.Method) -> nn.Module:
    """The model as the method prepares it, with recomputation."""
    built = load(model, objective=model.objective, num_labels=CLASSES, device=torch.device("cpu"), seed=0, folder=None)
    by = wiring.method(how)
    built = by.prepare(built)
    if isinstance(model, schema.Transformer):
        by.recompute(built, recompute.policies(train.recompute, len(blocks(built))))
    return built.train()


def batch(model: schema.Model, train: schema.Train, padded: bool) -> dict[str, torch.Tensor]:
    if isinstance(model, schema.ConvNet):
        size = (train.micro_batch, model.channels, model.image_size, model.image_size)
        return {"pixel_values": torch.rand(size), "labels": torch.zeros(train.micro_batch, dtype=torch.long)}
    ids = torch.randint(0, 300, (train.micro_batch, train.length))
    labels = {
        "causal_lm": ids,
        "classification": torch.zeros(train.micro_batch, dtype=torch.long),
        "seq2seq": torch.randint(0, 300, (train.micro_batch, train.target_length)),
    }
    result = {"input_ids": ids, "labels": labels[model.objective]}
    if padded:
        result["attention_mask"] = torch.ones_like(ids)
        result["attention_mask"][0, -16:] = 0
    return result


def autocast(model: schema.Model, train: schema.Train) -> torch.autocast:
    on = train.precision == "bf16" and model.dtype == "fp32"
    return torch.autocast("cpu", torch.bfloat16, enabled=on)


def saved_bytes(built: nn.Module, inputs: dict[str, torch.Tensor], context: torch.autocast) -> int:
    """Bytes of all storages that autograd, or a checkpoint, keeps in one forward."""

    def forward() -> torch.Tensor:
        with context:
            loss: torch.Tensor = built(**inputs).loss
        return loss

    return saved_tensors(built, forward)


def _forward(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, *_: Any, **__: Any) -> int:
    return sdpa_flop_count(q.shape, k.shape, v.shape)


def _backward(g: torch.Tensor, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, *_: Any, **__: Any) -> int:
    return sdpa_backward_flop_count(g.shape, q.shape, k.shape, v.shape)


def _addmm(_: Any, a: torch.Size, b: torch.Size, **__: Any) -> int:
    return 2 * a[0] * a[1] * b[1]


_forward._get_raw = _backward._get_raw = True  # type: ignore[attr-defined]


def counted_flops(built: nn.Module, inputs: dict[str, torch.Tensor], context: torch.autocast) -> int:
    """FLOPs of forward and backward by torch's counter, which is taught the CPU's fused attention and sums in place."""
    ops = torch.ops.aten
    mapping = {
        ops._scaled_dot_product_flash_attention_for_cpu: _forward,
        ops._scaled_dot_product_flash_attention_for_cpu_backward: _backward,
        ops.addmm_: _addmm,
    }
    with FlopCounterMode(display=False, custom_mapping=mapping) as counter:
        with context:
            loss = built(**inputs).loss
        loss.backward()
    return counter.get_total_flops()
