"""Variants in turns within one run, so that whatever else the machine does falls on all of them alike.

A turn builds a model, attaches the variant, takes steps that are not timed and then those that are. Each step begins at
a barrier; its time is that of the slowest rank, on which all others wait at the next one. Before, a few steps have
everything that comes once: buckets made anew, connections, pages of memory.
"""

from __future__ import annotations

import gc
import time
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field

import torch
import torch.distributed as dist
from torch import Tensor, nn

from llmsys import schema
from llmsys.comm import collectives
from llmsys.comm.traffic import Traffic
from llmsys.compress.measure.stack import RATE, Forward
from llmsys.compress.measure.variants import TORCH_DENSE_STEPS, Attached, Variant
from llmsys.schema.measured import TORCH

COUNTED = 2
"""Of the steps that are not timed, the last ones: in these collectives are counted. ACP-SGD's are of two kinds."""

GRADIENTS = ("all_reduce", "all_gather", "all_to_all")
"""Kinds of collectives that carry gradients; DDP also broadcasts how it has cut its buckets, once."""

Make = Callable[[Variant], tuple[nn.Module, Forward]]
"""A fresh model for a variant, and its forward pass."""


@dataclass
class Samples:
    """Of all turns of a variant. Seconds a step: of the slowest rank, `compress_s` and `decompress_s` of rank 0.

    `calls` and `bytes` of collectives in `COUNTED` steps of a turn, by kind (None: not known); `buckets`: parameters'
    names, as they are exchanged; those of DDP's own all-reduce are not known.
    """

    step_s: list[float] = field(default_factory=list)
    compress_s: list[float] = field(default_factory=list)
    decompress_s: list[float] = field(default_factory=list)
    calls: Counter[str] | None = None
    bytes: Counter[str] = field(default_factory=Counter)
    buckets: list[list[str]] = field(default_factory=list)


def turn(
    variant: Variant,
    task: schema.Measured,
    make: Make,
    samples: Samples,
    beat: Callable[[], None],
    *,
    update: bool,
) -> None:
    """One turn of `variant`, whose numbers are added to `samples`. `update`: by SGD, at the end of each step."""
    gc.collect()  # the model of the turn before: DDP's references go in circles
    model, forward = make(variant)
    attached = Attached(variant, task, model)
    optimizer = torch.optim.SGD(model.parameters(), lr=RATE) if update else None
    device = next(model.parameters()).device

    def step() -> float:
        if optimizer is not None:
            optimizer.zero_grad()
        _wait(device)
        dist.barrier()
        before = time.perf_counter()
        forward(attached.wrapped).backward()
        attached.exchange()
        if optimizer is not None:
            optimizer.step()
        _wait(device)
        return time.perf_counter() - before

    warmup = task.warmup + (TORCH_DENSE_STEPS if variant.method == TORCH else 0)
    for _ in range(warmup - COUNTED):
        step()
        beat()
    traffic = Traffic()
    for _ in range(COUNTED):
        with traffic:
            step()
        beat()
    if variant.method != TORCH:  # whose second and third collective start in callbacks, where nobody counts
        samples.calls = Counter({kind: traffic.calls[kind] for kind in GRADIENTS})
        samples.bytes = Counter({kind: traffic.bytes[kind] for kind in GRADIENTS})
    samples.buckets = attached.noted
    clock = attached.clock
    if clock is not None:
        clock.on = device.type != "cuda"  # see `Clocked`
    mine = []
    for _ in range(task.steps):
        mine.append(_clocked(attached, samples, step))
        beat()
    samples.step_s += collectives.all_gather(torch.tensor(mine, dtype=torch.float64, device=device)).amax(0).tolist()
    if clock is not None and not clock.on:
        clock.on = True
        for _ in range(COUNTED):
            _clocked(attached, samples, step)


def _clocked(attached: Attached, samples: Samples, step: Callable[[], float]) -> float:
    clock = attached.clock
    if clock is None:
        return step()
    clock.reset()
    seconds = step()
    if clock.on:
        samples.compress_s.append(clock.compress_s)
        samples.decompress_s.append(clock.decompress_s)
    return seconds


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def token(device: torch.device) -> Tensor:
    """What goes through a paced model: its backward pass needs something to begin with."""
    return torch.ones((), device=device, requires_grad=True)
