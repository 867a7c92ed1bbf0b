"""A method with its settings, attached to a model: what one cell of the tables stands for.

With overlap it is a communication hook of DDP, and `none` DDP without one. Without overlap gradients are exchanged by
an `Aggregator` after the backward pass. `noop` has a hook that exchanges nothing: the iteration's own computation.
"""

from __future__ import annotations

import itertools
import math
import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from llmsys import schema
from llmsys.compress.aggregate import Aggregator
from llmsys.compress.config import CompressConfig
from llmsys.compress.hook import HookState, compress_hook
from llmsys.compress.measure.clock import Clocked
from llmsys.compress.measure.paced import PacedModel
from llmsys.schema.compress import LOW_RANK
from llmsys.schema.measured import NOOP, TORCH
from llmsys.train.engines.ddp import NO_BUFFERS

PACKED = "powersgd_packed"
WHOLE_MIB = 1e6
"""A bucket that everything fits into."""
TORCH_DENSE_STEPS = 2
"""Steps that torch's hook exchanges whole before it compresses: the least it admits."""


@dataclass(frozen=True)
class Variant:
    """`method` is one of `schema.measured.MEASURED`; `bucket_mib` 0 leaves each tensor alone."""

    method: str
    bucket_mib: float
    overlap: bool
    r: int
    batch: int

    @property
    def name(self) -> str:
        overlap = "overlap" if self.overlap else "serial"
        return f"{self.method}/bucket={self.bucket_mib:g},{overlap},r={self.r},batch={self.batch}"

    @property
    def kind(self) -> str:
        """What decides how fast it compresses: the method, and r where that matters."""
        return f"{self.method}, r={self.r}" if self.low_rank else self.method

    @classmethod
    def parse(cls, name: str) -> Variant:
        """Of a `name`."""
        method, _, rest = name.partition("/")
        bucket, overlap, r, batch = (part.rpartition("=")[2] for part in rest.split(","))
        return cls(method, float(bucket), overlap == "overlap", int(r), int(batch))

    @property
    def low_rank(self) -> bool:
        return self.method in (*LOW_RANK, PACKED, TORCH)

    def config(self, task: schema.Measured) -> CompressConfig:
        """Our settings; `noop` and torch's hook have none, and S-SGD's are DDP's own."""
        assert self.method not in (NOOP, TORCH)
        method = "powersgd" if self.method == PACKED else self.method
        return CompressConfig(method=method, r=self.r, min_rate=task.min_rate, density=task.density)


def variants(task: schema.Measured, ranks: Sequence[int], batches: Sequence[int]) -> list[Variant]:
    """What is measured, `noop` first. What a setting means nothing to is measured with its first value alone: r for
    methods without, everything but the batch for `noop`, and buckets and overlap for what is in one after the pass."""
    found = [Variant(NOOP, task.bucket_mib[0], True, ranks[0], batch) for batch in batches]
    for mib, overlap, method, r, batch in itertools.product(
        task.bucket_mib, task.overlap, task.methods, ranks, batches
    ):
        if method == NOOP:
            continue
        made = Variant(method, mib, overlap, r, batch)
        if not made.low_rank:
            made = Variant(method, mib, overlap, ranks[0], batch)
        if method in (PACKED, TORCH):
            made = Variant(method, WHOLE_MIB, method == TORCH, r, batch)
        found.append(made)
    return list(dict.fromkeys(found))


class Attached:
    """A variant on a model of its own. `noted` after each step: names of the parameters, bucket by bucket."""

    def __init__(self, variant: Variant, task: schema.Measured, model: nn.Module) -> None:
        self.variant, self.model = variant, model
        self.clock: Clocked | None = None
        self.noted: list[list[str]] = []
        self._names: dict[Tensor, str] = {p: name for name, p in model.named_parameters()}
        self._aggregator: Aggregator | None = None
        self.wrapped: nn.Module = model
        if variant.overlap:
            self._hook(task)
        else:
            named = [(name, p) for name, p in model.named_parameters() if p.requires_grad]
            self._aggregator = Aggregator(named, variant.config(task), bucket_mib=_cap(variant.bucket_mib))
            self._clocked(self._aggregator)
            self.noted = [[named[i][0] for i in bucket] for bucket in self._aggregator.buckets]

    def _hook(self, task: schema.Measured) -> None:
        method = self.variant.method
        self.wrapped = ddp = DistributedDataParallel(
            self.model,
            bucket_cap_mb=_cap(self.variant.bucket_mib),
            gradient_as_bucket_view=True,
            init_sync=False,  # ranks make equal models, and a slow link would take its time over them
            **NO_BUFFERS,
        )
        state: Any = None
        hook: Any
        if method == NOOP:
            hook = _noop
        elif method == TORCH:
            from torch.distributed.algorithms.ddp_comm_hooks import powerSGD_hook

            state = powerSGD_hook.PowerSGDState(
                None, self.variant.r, start_powerSGD_iter=TORCH_DENSE_STEPS, orthogonalization_epsilon=1e-8
            )
            hook = powerSGD_hook.powerSGD_hook
        elif method == "none":
            return
        else:
            state, hook = HookState(self.variant.config(task), self.model), compress_hook
            state.check(next(self.model.parameters()).device)
            self._clocked(state)

        def noting(state: Any, bucket):  # type: ignore[no-untyped-def]  # DDP checks what is annotated
            before = time.perf_counter()
            self._note(bucket)
            future = hook(state, bucket)
            if isinstance(self.model, PacedModel):
                self.model.hook_s += time.perf_counter() - before
            return future

        ddp.register_comm_hook(state, noting)

    def _clocked(self, state: Any) -> None:
        self.clock = Clocked(state.method, next(self.model.parameters()).device)
        state.method = self.clock

    def _note(self, bucket: dist.GradBucket) -> None:
        if bucket.index() == 0:
            self.noted = []
        self.noted.append([self._names[p] for p in bucket.parameters()])

    def exchange(self) -> None:
        """After the backward pass: what has not overlapped with it."""
        if self._aggregator is not None:
            self._aggregator.aggregate([_gradient(p) for p in self._names if p.requires_grad])


def _noop(state: None, bucket: dist.GradBucket) -> torch.futures.Future[Tensor]:
    done: torch.futures.Future[Tensor] = torch.futures.Future()
    done.set_result(bucket.buffer())
    return done


def _gradient(parameter: Tensor) -> Tensor:
    assert parameter.grad is not None
    return parameter.grad


def _cap(mib: float) -> float:
    """0 as the least that DDP takes: a byte, which each tensor exceeds."""
    return mib if mib else math.ldexp(1.0, -20)
