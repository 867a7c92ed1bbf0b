"""What a whole model needs, by `llmsys.cost`, without building it; and what freezing A buys where all else is equal."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence

from llmsys import schema
from llmsys.cost import memory, shapes, step_flops, traffic
from llmsys.cost.case import Case
from llmsys.lorafa.ledger.columns import Column

LOCAL = schema.Engine()


def case(model: schema.Transformer, train: schema.Train, column: Column, *, device: str, padded: bool | None) -> Case:
    """`padded`: None for what is usual, a mask for encoders and T5."""
    chosen = dataclasses.replace(train, recompute=column.policy)
    return Case(model, chosen, column.method, LOCAL, padded=padded, device=device)


def kept_a_block(model: schema.Transformer, train: schema.Train, column: Column) -> int:
    """Bytes that one more block a stack keeps, by the cost model, where `measure` measures: to hold them together."""
    deeper = dataclasses.replace(model, num_layers=model.num_layers + 1)
    fewer, more = (
        memory.ledger(case(each, train, column, device="cpu", padded=False)).kept for each in (model, deeper)
    )
    return more - fewer


def at(train: schema.Train, batch: int, length: int) -> schema.Train:
    """Steps of one micro-batch of this size; of T5's targets the same."""
    return dataclasses.replace(train, micro_batch=batch, global_batch=batch, length=length, target_length=length)


def whole(model: schema.Transformer, train: schema.Train, column: Column) -> dict[str, int]:
    """On one GPU: `saved` bytes, logits included, and the `peak` of a step, weights and optimizer included."""
    told = case(model, train, column, device="cuda", padded=None)
    parts = memory.ledger(told)
    peak = memory.peak_bytes(model, told.train, told.method, LOCAL, device="cuda")
    return {"saved": parts.kept + parts.logits, "peak": peak}


def freezing(
    model: schema.Transformer, train: schema.Train, lora: Column, lorafa: Column
) -> dict[str, dict[str, float]]:
    """What `lora` and `lorafa` of ours need of each kind, at one r and one policy, whole model and one step on a GPU.

    `adapter_file`: what `save_adapter` writes, but for its header: a trained A, and B. `all_reduce`: bytes of gradients
    under data parallelism.
    """
    return {column.method.kind: _needs(model, train, column) for column in (lora, lorafa)}


def _needs(model: schema.Transformer, train: schema.Train, column: Column) -> dict[str, float]:
    told = case(model, train, column, device="cuda", padded=None)
    kinds = memory.estimate(model, told.train, told.method, LOCAL, device="cuda")
    ranks = dataclasses.replace(told.train, world=2, global_batch=2 * train.micro_batch)
    payload = traffic.step_payload(model, ranks, told.method, schema.DDP(kind="ddp"), device="cuda")
    adapters = [p for p in shapes.held(told) if ".lora_" in p.name]
    return {
        "saved_bytes": kinds["activations"] + kinds["logits"],
        "trainable_params": shapes.trainable_params(told),
        "gradient_bytes": kinds["gradients"],
        "optimizer_bytes": kinds["optimizer"],
        "all_reduce_bytes": payload["all_reduce"],
        "step_flops": step_flops(model, told.train, told.method, LOCAL, device="cuda"),
        "adapter_file_bytes": sum(p.nbytes for p in adapters),
        "peak_bytes": memory.peak_bytes(model, told.train, told.method, LOCAL, device="cuda"),
    }


def equal_rank(model: schema.Transformer, train: schema.Train, lora: Column, lorafa: Column) -> dict[str, int]:
    """The largest r at which LoRA-FA needs no more than LoRA at its own r: `params` trained, `peak` bytes of a step.

    At most the model's width; 0 where r = 1 needs more already.
    """

    def widened(r: int) -> Column:
        assert isinstance(lorafa.method, schema.LoRA)
        return dataclasses.replace(lorafa, method=dataclasses.replace(lorafa.method, r=r))

    def params(column: Column) -> int:
        return shapes.trainable_params(case(model, train, column, device="cuda", padded=None))

    def peak(column: Column) -> int:
        return whole(model, train, column)["peak"]

    width = min(min(layer.n_in, layer.n_out) for layer in shapes.linears(model))
    measures: Sequence[tuple[str, Callable[[Column], int]]] = (("params", params), ("peak", peak))
    found = {}
    for name, of in measures:
        limit, low, high = of(lora), 0, width + 1  # low fits, high does not
        while high - low > 1:
            middle = (low + high) // 2
            low, high = (middle, high) if of(widened(middle)) <= limit else (low, middle)
        found[name] = low
    return found
