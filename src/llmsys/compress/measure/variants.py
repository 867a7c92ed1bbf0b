"""A method with its settings, attached to a model: what one cell of the tables stands for.

With overlap it is a communication hook of DDP, and `none` DDP without one. Without overlap it is the same hook, which
leaves each bucket alone until the backward pass is over: the same buckets and the same copies. `noop` has a hook that
exchanges nothing: the iteration's own computation.
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
from llmsys.compress.config import CompressConfig
from llmsys.compress.hook import HookState, compress_hook
from llmsys.compress.measure.clock import Clocked
from llmsys.compress.measure.paced import PacedModel
from llmsys.compress.transfer import finish
from llmsys.schema.compress import LOW_RANK
from llmsys.schema.measured import NOOP, TORCH
from llmsys.train.engines.ddp import NO_BUFFERS

PACKED = "powersgd_packed"
WHOLE_MIB = 1e6
"""A bucket that everything fits into."""
DEFAULT_MIB = 25.0
"""DDP's own; where it is not asked for another, the first bucket is smaller (`simulate.predict.FIRST_MIB`)."""
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
    """What is measured, `noop` first, with each size of buckets. What a setting means nothing to is measured with its
    first value alone: r for methods without, buckets and overlap for what is in one."""
    sizes = [*task.bucket_mib, *([WHOLE_MIB] if {PACKED, TORCH} & set(task.methods) else [])]
    found = [Variant(NOOP, mib, True, ranks[0], batch) for mib, batch in itertools.product(sizes, batches)]
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
        self.pass_end = 0.0
        """When the last step's backward pass had no more to do (`time.perf_counter`)."""
        self._names: dict[Tensor, str] = {p: name for name, p in model.named_parameters()}
        self._late: list[tuple[list[str], list[Tensor], Tensor]] = []
        self._state: HookState | None = None
        self.wrapped = DistributedDataParallel(
            model,
            bucket_cap_mb=_cap(variant.bucket_mib),
            gradient_as_bucket_view=True,
            init_sync=False,  # ranks make equal models, and a slow link would take its time over them
            **NO_BUFFERS,
        )
        if variant.method == "none" and variant.overlap:
            return
        hook, state = self._hook(task)
        if isinstance(model, PacedModel):
            model.excluded = self._hooks_s
        self._hook_s = 0.0

        def noting(state: Any, bucket):  # type: ignore[no-untyped-def]  # DDP checks what is annotated
            before = time.perf_counter()
            self._note(bucket)
            future = hook(state, bucket)
            self.pass_end = time.perf_counter()
            self._hook_s += self.pass_end - before
            return future

        self.wrapped.register_comm_hook(state, noting)

    def _hook(self, task: schema.Measured) -> tuple[Any, Any]:
        """The hook and its state."""
        variant = self.variant
        if variant.method == NOOP:
            return _nothing, None
        if variant.method == TORCH:
            from torch.distributed.algorithms.ddp_comm_hooks import powerSGD_hook

            state = powerSGD_hook.PowerSGDState(
                None,
                variant.r,
                start_powerSGD_iter=TORCH_DENSE_STEPS,
                min_compression_rate=task.min_rate or 1e-9,
                orthogonalization_epsilon=1e-8,
            )
            return powerSGD_hook.powerSGD_hook, state
        device = next(self.model.parameters()).device
        self._state = HookState(variant.config(task), self.model)
        self._state.check(device)
        self.clock = Clocked(self._state.method, device)
        self._state.method = self.clock
        return (compress_hook if variant.overlap else self._keep), self._state

    def _note(self, bucket: dist.GradBucket) -> None:
        if bucket.index() == 0:
            self.noted = []
        self.noted.append([self._names[p] for p in bucket.parameters()])

    def _keep(self, state: HookState, bucket: dist.GradBucket) -> torch.futures.Future[Tensor]:
        self._late.append((self.noted[-1], bucket.gradients(), bucket.buffer()))
        return _nothing(None, bucket)

    def _hooks_s(self) -> float:
        """Seconds that hooks and their callbacks have taken since the clock was reset."""
        return self._hook_s + (self.clock.decompress_s if self.clock is not None and self.variant.overlap else 0.0)

    def begin(self) -> None:
        """Before each step."""
        self._hook_s = 0.0
        if self.clock is not None:
            self.clock.reset()

    def detach(self) -> None:
        """At the end: DDP's reducer holds the hook and the hook this, in C++ where no collector looks."""
        del self.wrapped

    def exchange(self) -> None:
        """After the backward pass: what has not overlapped with it."""
        if self.variant.overlap or self._state is None:
            return
        state, late = self._state, self._late
        state.begin()
        transfers = [state.start(*bucket) for bucket in late]
        state.advance()
        for index in finish(transfers):
            state.end(transfers[index])
        late.clear()


def _nothing(state: None, bucket: dist.GradBucket) -> torch.futures.Future[Tensor]:
    done: torch.futures.Future[Tensor] = torch.futures.Future()
    done.set_result(bucket.buffer())
    return done


def _cap(mib: float) -> float | None:
    """As DDP takes it: None its default. 0 is the least, a byte, which each tensor exceeds."""
    if mib == DEFAULT_MIB:
        return None
    return mib if mib else math.ldexp(1.0, -20)
