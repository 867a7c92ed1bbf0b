"""What the owner of a job makes of a config: the graph of a step's loss, its data, and the machines that it starts.

A step's loss is the mean over all its label positions, as in `llmsys.train.loop`. Micro-batches have unequal numbers of
labels, so that each one's loss is traced with a weight, which comes with its data.
"""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Mapping, Sequence

import numpy as np
import torch
from torch import Tensor, nn

from llmsys import schema
from llmsys.decentral.chain import Chain
from llmsys.decentral.cost import Costs, Workload
from llmsys.decentral.fleet import Fleet, Provider
from llmsys.decentral.plan import Planner
from llmsys.decentral.trace import Traced, trace
from llmsys.decentral.training import TENSOR_BYTES
from llmsys.lorafa import traceable
from llmsys.train.evaluate import label_count, token_count
from llmsys.train.loop import Loop

WEIGHT = "weight"
WITHIN = "model."
"""What `Weighted` puts before each name."""
CLOSE, SLACK = 1.001, 1.02


class Weighted(nn.Module):
    """A model whose loss counts for `weight`."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, weight: Tensor, **batch: Tensor) -> Tensor:
        loss: Tensor = self.model(**batch).loss.float() * weight
        return loss


class Batches:
    """A step's micro-batches, each with its weight: n_i M / n, of M micro-batches of n_i labels, n together."""

    def __init__(self, loop: Loop) -> None:
        self.loop, self.objective = loop, loop.config.model.objective
        self.tokens: dict[int, int] = {}
        lengths = getattr(loop.dataset.train, "lengths", None)
        self.padded = lengths is not None and min(lengths) < loop.config.train.length  # then each batch has a mask

    def of(self, step: int) -> list[dict[str, Tensor]]:
        """Of step `step`, from 1. ValueError for one without labels."""
        batches = self.loop.micro_batches(step - 1)
        if self.padded:
            batches = [{"attention_mask": torch.ones_like(each["input_ids"]), **each} for each in batches]
        labels = [label_count(each, self.objective) for each in batches]
        self.tokens[step] = sum(token_count(each, self.objective) for each in batches)
        if not sum(labels):
            raise ValueError(
                f"data: step {step} has no label token within train.length={self.loop.config.train.length}"
            )
        shares = [torch.tensor(count * len(batches) / sum(labels)) for count in labels]
        return [{**batch, WEIGHT: share} for share, batch in zip(shares, batches, strict=True)]


def traced(model: nn.Module, batch: Mapping[str, Tensor]) -> Traced:
    """The graph of a micro-batch's loss, whose parameters have the model's own names. ValueError for a model that does
    not export."""
    model.train()
    with traceable(model):
        return trace(Weighted(model), batch)


def put(model: nn.Module, state: Mapping[str, Tensor]) -> None:
    """What has been trained, by `traced`'s names, into the model, in place."""
    own = {**dict(model.named_buffers()), **dict(model.named_parameters())}
    with torch.no_grad():
        for key, tensor in state.items():
            own[key.removeprefix(WITHIN)].copy_(tensor)


def carried(own: Chain, task: schema.Together, size: Mapping[str, int]) -> Chain:
    """Cut only where a frame carries what a micro-batch sends, either way. ValueError where several stages are asked
    for and that is nowhere: which settings to lower, of those that make its `size`."""
    inner = own.places[1:-1]
    nbytes = np.maximum(own.ahead, own.back)[inner]
    places = inner[nbytes <= TENSOR_BYTES]
    if task.stages > 1 and len(inner) and not len(places):
        given = ", ".join(f"{key}={value}" for key, value in size.items())
        raise ValueError(
            f"{given}: wherever the model is cut, a micro-batch sends {nbytes.min() / 2**20:.0f} MiB at once, and at "
            f"most {TENSOR_BYTES >> 20} are carried: lower {' or '.join(size)}"
        )
    return dataclasses.replace(own, places=np.concatenate([own.places[:1], places, own.places[-1:]]))


def pins(own: Chain, layers: Sequence[int]) -> tuple[int, int]:
    """How many operators at the beginning and at the end are the owner's: the embedding and the first `layers[0]`
    layers, the last `layers[1]`, the head and the loss; none of them where `layers` is empty. ValueError where
    there are no such layers."""
    if not layers:
        return 0, 0
    numbers = [int(found.group(1)) if (found := _LAYER.search(block)) else None for block in own.blocks]
    there = [each for each in numbers if each is not None]
    count = max(there, default=-1) + 1
    if sum(layers) >= count:
        raise ValueError(f"task.private={list(layers)}: the model has {count} layers")
    first = next(at for at, number in enumerate(numbers) if number == layers[0])
    last = max(at for at, number in enumerate(numbers) if number is not None and number < count - layers[1])
    return first, len(numbers) - 1 - last


_LAYER = re.compile(r"\.(\d+)$")


def machines(task: schema.Together, own: Chain, work: Workload) -> list[Provider]:
    """p0, p1, ..., as they are started. ValueError where so many stages cannot hold the job, whatever they have."""
    mem_gib = task.mem_gib or SLACK * enough(task, own, work)
    return [_machine(task, at, mem_gib) for at in range(task.providers)]


def enough(task: schema.Together, own: Chain, work: Workload) -> float:
    """GiB with which as many as `task.stages` providers hold the job, and fewer do not."""

    def holds(mem_gib: float) -> bool:
        fleet = Fleet(providers=tuple(_machine(task, at, mem_gib) for at in range(task.stages)))
        return Planner(Costs(own, fleet, work), thorough=False).best() is not None

    low, high = 1e-6, 1e6
    if not holds(high):
        raise ValueError(f"task.stages={task.stages}: the model is not cut into so many")
    while high / low > CLOSE:
        middle = (low * high) ** 0.5
        low, high = (low, middle) if holds(middle) else (middle, high)
    return high


def _machine(task: schema.Together, at: int, mem_gib: float) -> Provider:
    return Provider(
        name=f"p{at}",
        tflops=task.tflops,
        efficiency=1.0,
        mem_gib=mem_gib,
        up_mbit=task.up_mbit,
        down_mbit=task.down_mbit,
        plane=task.planes[at % len(task.planes)],
        trusted=not task.private or at < task.trusted,
    )
