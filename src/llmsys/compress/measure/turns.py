"""Variants in turns within one run, so that whatever else the machine does falls on all of them alike.

A turn builds a model, attaches the variant, takes steps that are not timed and then those that are. Each step begins at
a barrier; its time is that of the slowest rank, on which all others wait at the next one. Before, a few steps have
everything that comes once: buckets made anew, connections, pages of memory.

What is kept is the mean of two steps, one after another: ACP-SGD's are of two kinds, of different lengths.
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
    """Of all turns of a variant, in seconds a step, each the mean of a pair of steps.

    `step_s` of the slowest rank, pair by pair, turn by turn. `compress_s`, `decompress_s`: means over the ranks;
    `exposed_s`: what of the latter lies behind the backward pass. `calls` and `bytes` of collectives in `COUNTED` steps
    of a turn, by kind (None: not known). `buckets`: parameters' names, as they are exchanged; DDP's own all-reduce does
    not say, but its are those of a hook.
    """

    step_s: list[list[float]] = field(default_factory=list)
    compress_s: list[float] = field(default_factory=list)
    decompress_s: list[float] = field(default_factory=list)
    exposed_s: list[float] = field(default_factory=list)
    calls: Counter[str] | None = None
    bytes: Counter[str] = field(default_factory=Counter)
    buckets: list[list[str]] = field(default_factory=list)

    def add(self, later: Samples) -> None:
        """Takes the turns of `later` too."""
        for key in ("step_s", "compress_s", "decompress_s", "exposed_s"):
            getattr(self, key).extend(getattr(later, key))
        self.calls, self.bytes, self.buckets = later.calls, later.bytes, later.buckets

    @property
    def pairs_s(self) -> list[float]:
        """Of all turns."""
        return [seconds for turn in self.step_s for seconds in turn]


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

    def step() -> list[float]:
        """Seconds of the step, of compression, of decompression and of what of it is behind the backward pass."""
        if optimizer is not None:
            optimizer.zero_grad()
        attached.begin()
        _wait(device)
        dist.barrier()
        before = time.perf_counter()
        forward(attached.wrapped).backward()
        if not variant.overlap:
            attached.pass_end = time.perf_counter()
        attached.exchange()
        if optimizer is not None:
            optimizer.step()
        _wait(device)
        took, clock = time.perf_counter() - before, attached.clock
        if clock is None:
            return [took, 0.0, 0.0, 0.0]
        return [took, clock.compress_s, clock.decompress_s, clock.exposed(attached.pass_end)]

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
    on_cuda, clock = device.type == "cuda", attached.clock
    if clock is not None:
        clock.on = not on_cuda  # see `Clocked`
    mine = []
    for _ in range(task.steps):
        mine.append(step())
        beat()
    everywhere = collectives.all_gather(torch.tensor(mine, dtype=torch.float64, device=device))
    samples.step_s.append(_paired(everywhere.amax(0)[:, 0]))
    if clock is not None:
        if on_cuda:
            clock.on = True
            everywhere = collectives.all_gather(
                torch.tensor([step() for _ in range(COUNTED)], dtype=torch.float64, device=device)
            )
        means = everywhere.mean(0)
        for column, values in enumerate((samples.compress_s, samples.decompress_s, samples.exposed_s), 1):
            values += _paired(means[:, column])
    attached.detach()


def _paired(values: Tensor) -> list[float]:
    """Means of each two, one after another."""
    return [float(mean) for mean in values.view(-1, 2).mean(1)]


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def token(device: torch.device) -> Tensor:
    """What goes through a paced model: its backward pass needs something to begin with."""
    return torch.ones((), device=device, requires_grad=True)
