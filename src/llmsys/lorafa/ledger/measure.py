"""Measures one column: what an inner block saves, by origin, and what is alive, on a CPU.

Three passes over one batch: with hooks; without them, all operators counted, forward; and backward from there.
"""

from __future__ import annotations

import contextlib
import dataclasses
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from llmsys import schema
from llmsys.lorafa.ledger.columns import Column
from llmsys.lorafa.ledger.origins import Origins
from llmsys.lorafa.methods import LoRAFA
from llmsys.lorafa.peft_baselines import LoRA
from llmsys.lorafa.peft_baselines import LoRAFA as PeftLoRAFA
from llmsys.profile.live import Live
from llmsys.profile.memory import saved_tensors
from llmsys.train.methods import Full

METHODS: dict[str, Any] = {"full": Full, "lora_peft": LoRA, "lorafa_peft": PeftLoRAFA, "lora": LoRAFA, "lorafa": LoRAFA}
CLASSES = 2


class NotCompiled(Exception):
    """torch.compile failed; its words."""


@dataclass(frozen=True, kw_only=True)
class Measured:
    """Of one column. `blocks`: of the inner block of each stack (T5 has two), bytes by origin. `outside`: bytes by
    origin of the model's ends. `hooks`: all saved bytes; `live`: alive after the forward pass; `backward`: the most
    that is alive in the backward pass, gradients included. 0 where it was not measured."""

    blocks: dict[str, dict[str, int]]
    outside: dict[str, int] = field(default_factory=dict)
    hooks: int = 0
    live: int = 0
    backward: int = 0
    seconds: float = 0.0


def measure(model: schema.Transformer, train: schema.Train, column: Column, backend: str) -> Measured:
    """Of the last block of each stack of `model`, which is small; compiled, of a block of both together.

    NotCompiled where torch.compile fails.
    """
    start = time.perf_counter()
    if column.compiled:
        deeper = dataclasses.replace(model, num_layers=model.num_layers + 1)
        fewer, more = (_compiled(shape, train, column, backend) for shape in (model, deeper))
        found = Measured(blocks={"": {"compiled": more - fewer}})
    else:
        found = _eager(model, train, column)
    return dataclasses.replace(found, seconds=time.perf_counter() - start)


def _eager(model: schema.Transformer, train: schema.Train, column: Column) -> Measured:
    built, inputs = build(model, column), batch(model, train)
    origins = Origins(built, "input" if column.policy == "block" else "")

    def forward() -> Tensor:
        loss: Tensor = built(**inputs).loss
        origins.graph(loss)
        return loss

    try:
        hooks = saved_tensors(built, forward, origins.noted)
    finally:
        origins.close()
    assert hooks == origins.total()
    with Live() as live:
        loss = built(**inputs).loss
        alive = live.now - loss.nbytes
        live.mark()
        loss.backward()
    last = origins.blocks[model.num_layers - 1 :: model.num_layers]  # of each stack
    return Measured(
        blocks={name: origins.by_origin(name) for name in last},
        outside=origins.by_origin(""),
        hooks=hooks,
        live=alive,
        backward=live.peak,
    )


def _compiled(model: schema.Transformer, train: schema.Train, column: Column, backend: str) -> int:
    """All saved bytes with each block compiled. A step goes before, in which it happens."""
    from llmsys.models import blocks

    built, inputs = build(model, column), batch(model, train)
    with _fresh_compiler():
        try:
            for _, block in blocks(built):
                block.compile(backend=backend)
            built(**inputs).loss.backward()
            return saved_tensors(built, lambda: built(**inputs).loss)
        except torch._dynamo.exc.TorchDynamoException as error:
            raise NotCompiled(" ".join([type(error).__name__, *str(error).split("\n")[:2]])) from error


@contextlib.contextmanager
def _fresh_compiler() -> Iterator[None]:
    """Nothing compiled before is used, nor left behind."""
    torch._dynamo.reset()
    try:
        yield
    finally:
        torch._dynamo.reset()


def build(model: schema.Transformer, column: Column) -> nn.Module:
    """The model of random weights as the column's method prepares it, in training mode, on the CPU."""
    from llmsys import models
    from llmsys.models import blocks

    torch.manual_seed(0)
    built = models.load(
        model, objective=model.objective, num_labels=CLASSES, device=torch.device("cpu"), seed=0, folder=None
    )
    method = METHODS[column.method.kind]
    by = method() if column.method.kind == "full" else method(column.method)
    built = by.prepare(built)
    by.recompute(built, [column.policy] * len(blocks(built)))
    return built.train()


def batch(model: schema.Transformer, train: schema.Train) -> dict[str, Tensor]:
    """Random tokens [micro_batch, length], all of them real: no mask."""
    generator = torch.Generator().manual_seed(0)

    def tokens(length: int) -> Tensor:
        return torch.randint(3, model.vocab_size, (train.micro_batch, length), generator=generator)

    ids = tokens(train.length)
    if model.objective == "classification":
        return {"input_ids": ids, "labels": torch.zeros(train.micro_batch, dtype=torch.long)}
    return {"input_ids": ids, "labels": ids if model.objective == "causal_lm" else tokens(train.target_length)}
