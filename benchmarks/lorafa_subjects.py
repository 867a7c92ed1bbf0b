"""What the LoRA-FA benchmarks compare: peft's adapters and ours, on one base model, at one rank.

    peft_lora           peft's LoRA as it comes: adapters in fp32
    peft_lora_bf16      the same in bf16, beside a bf16 base
    peft_lorafa         peft's LoRA-FA: its own optimizer (`create_lorafa_optimizer`), which freezes A and corrects
                        B's gradient in every step
    lora/<policy>       ours with A trained, under a policy of `train.recompute`
    lorafa/<policy>     ours with A frozen

All but peft_lorafa use torch's fused AdamW. The base model is made once and goes from one to the next, so that they
differ in nothing else. At their start (B = 0) all compute the base model's loss.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from llmsys.schema.recompute import POLICIES

PEFT = ("peft_lora", "peft_lora_bf16", "peft_lorafa")
OURS = tuple(f"{method}/{policy}" for method in ("lora", "lorafa") for policy in POLICIES)
LR = 1e-4


@dataclass(frozen=True, kw_only=True)
class Setting:
    """What subjects have in common."""

    r: int = 16
    dropout: float = 0.0
    chunked_loss: bool = False

    @property
    def alpha(self) -> int:
        return 2 * self.r


class Trainer:
    """A model with adapters and its optimizer; `step` is what one would write by hand."""

    def __init__(self, model: Any, optimizer: torch.optim.Optimizer) -> None:
        self.model, self.optimizer = model, optimizer

    def step(self, batch: dict[str, Tensor]) -> float:
        """Forward, backward and update; the loss."""
        loss = self.model(**batch).loss
        loss.backward()
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        return loss.item()


@contextmanager
def trainer(base: Any, name: str, setting: Setting) -> Iterator[Trainer]:
    """A subject on `base`, whose layers are changed in place and given back afterwards. ValueError: no such subject."""
    if name not in PEFT + OURS:
        raise ValueError(f"{name}: must be one of {', '.join(PEFT + OURS)}")
    torch.manual_seed(0)
    make = _peft if name in PEFT else _ours
    with _loss(base, setting.chunked_loss), make(base, name, setting) as made:
        yield made


@contextmanager
def _peft(base: Any, name: str, setting: Setting) -> Iterator[Trainer]:
    import peft

    config = peft.LoraConfig(
        r=setting.r,
        lora_alpha=setting.alpha,
        lora_dropout=setting.dropout,
        target_modules="all-linear",
        task_type="CAUSAL_LM",
    )
    model = peft.get_peft_model(base, config, autocast_adapter_dtype=name != "peft_lora_bf16")
    try:
        if name == "peft_lorafa":
            from peft.optimizers import create_lorafa_optimizer

            optimizer = create_lorafa_optimizer(model, r=setting.r, lora_alpha=setting.alpha, lr=LR)
        else:
            optimizer = _adamw(model)
        yield Trainer(model, optimizer)
    finally:
        model.unload()


@contextmanager
def _ours(base: Any, name: str, setting: Setting) -> Iterator[Trainer]:
    from llmsys.lorafa import LoRAFAConfig, inject, unload

    method, _, policy = name.partition("/")
    config = LoRAFAConfig(
        r=setting.r, alpha=setting.alpha, dropout=setting.dropout, recompute=policy, train_a=method == "lora"
    )
    inject(base, config)
    try:
        yield Trainer(base, _adamw(base))
    finally:
        unload(base)


@contextmanager
def _loss(base: Any, chunked: bool) -> Iterator[None]:
    """The base with its own loss, or with one that never has all logits."""
    if not chunked:
        yield
        return
    from llmsys.models import chunk_loss

    head = base.get_output_embeddings()
    plain = type(base), type(head)
    chunk_loss(base)
    try:
        yield
    finally:
        base.__class__, head.__class__ = plain


def _adamw(model: nn.Module) -> torch.optim.Optimizer:
    return torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=LR, weight_decay=0.0, fused=True)


def held_bytes(model: nn.Module) -> int:
    """Bytes of the weights, adapters included."""
    return sum(t.numel() * t.element_size() for t in (*model.parameters(), *model.buffers()))


def batch(vocab: int, size: int, length: int, device: torch.device) -> dict[str, Tensor]:
    """Random tokens [size, length], packed: every position has a label."""
    ids = torch.randint(vocab, (size, length), generator=torch.Generator().manual_seed(1)).to(device)
    return {"input_ids": ids, "labels": ids}


def check_first_losses(losses: dict[str, float], tolerance: float) -> None:
    """AssertionError where two subjects do not begin with the same loss."""
    first = next(iter(losses.values()))
    odd = {name: loss for name, loss in losses.items() if not math.isclose(loss, first, rel_tol=tolerance)}
    assert not odd, f"not the loss of the base model, {first}: {odd}"
