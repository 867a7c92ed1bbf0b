"""One combination at one micro-batch on so many ranks: what a step of it takes, predicted, or measured in runs."""

from __future__ import annotations

import dataclasses
import statistics
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Protocol

from llmsys import schema
from llmsys.bench.techniques import Techniques
from llmsys.job import Record

GIB = 2**30


class Predicted(Protocol):
    """What is read of a prediction; `llmsys.bench.predict.prediction.Prediction` is one. Bytes and ms as there."""

    @property
    def peak_bytes(self) -> int: ...
    @property
    def host_bytes(self) -> int: ...
    @property
    def capacity_bytes(self) -> float: ...
    @property
    def host_capacity_bytes(self) -> float | None: ...
    @property
    def fits(self) -> bool: ...
    @property
    def step_ms(self) -> float: ...
    @property
    def by_phase_ms(self) -> dict[str, float]: ...
    @property
    def tokens_per_s(self) -> float: ...
    @property
    def binds(self) -> str: ...
    @property
    def usd_per_million_tokens(self) -> float | None: ...
    @property
    def note(self) -> str: ...


Predict = Callable[[schema.Config], Predicted]


@dataclass(frozen=True, kw_only=True)
class Cell:
    """`tokens_per_s` of all ranks; `peak_bytes` of a device, `host_bytes` of all ranks in the host's memory; `binds`:
    what takes the largest share of the step, or `memory` where it does not fit; `examples` of a step before anything is
    accumulated. `runs`: of which runs the numbers are, none of a prediction; then `binds` and `usd` are still predicted
    ones (`usd` for a million tokens, at what was measured; None where no price is known)."""

    techniques: Techniques
    world: int
    micro_batch: int
    examples: int
    accumulation: int
    fits: bool
    tokens_per_s: float
    step_ms: float
    peak_bytes: int
    capacity_bytes: float
    host_bytes: int
    host_capacity_bytes: float | None
    binds: str
    by_phase_ms: dict[str, float] = field(default_factory=dict)
    usd: float | None = None
    note: str = ""
    runs: tuple[str, ...] = ()

    @property
    def measured(self) -> bool:
        return bool(self.runs)

    @property
    def device_hours(self) -> float:
        """For a million tokens."""
        return self.world * 1e6 / self.tokens_per_s / 3600

    @property
    def lacks(self) -> str:
        """Which memory does not suffice: `device`, `host`, or "" where both do."""
        if self.fits:
            return ""
        return "device" if self.peak_bytes > self.capacity_bytes or self.host_capacity_bytes is None else "host"

    def __str__(self) -> str:
        return f"{self.techniques} at micro-batch {self.micro_batch}"


def predicted(config: schema.Config, techniques: Techniques, made: Predicted) -> Cell:
    """The cell of a config and its prediction."""
    train = config.train
    return Cell(
        techniques=techniques,
        world=train.world,
        micro_batch=train.micro_batch,
        examples=train.micro_batch * schema.data_world(train, config.engine),
        accumulation=schema.accumulation(train, config.engine),
        fits=made.fits,
        tokens_per_s=made.tokens_per_s,
        step_ms=made.step_ms,
        peak_bytes=made.peak_bytes,
        capacity_bytes=made.capacity_bytes,
        host_bytes=made.host_bytes,
        host_capacity_bytes=made.host_capacity_bytes,
        binds=made.binds,
        by_phase_ms=dict(made.by_phase_ms),
        usd=made.usd_per_million_tokens,
        note=made.note,
    )


def measured(cell: Cell, runs: Sequence[Record], *, capped: bool) -> Cell:
    """`cell` with what its `runs`, repeats of one another, have measured: means, and the largest peak. One that ran out
    of memory makes it not fit; its other numbers are then still predicted ones. What ran does fit, unless the question
    is about less memory than the machine has (`capped`)."""
    ids = tuple(run.run_id for run in runs)
    if any(run.status != "ok" for run in runs):
        return dataclasses.replace(cell, fits=False, binds="memory", runs=ids)
    speed = statistics.fmean(run.summary["tokens_per_s"] for run in runs)
    peak = max(peak_bytes(run) for run in runs)
    return dataclasses.replace(
        cell,
        fits=not capped or peak <= cell.capacity_bytes,
        tokens_per_s=speed,
        step_ms=statistics.fmean(run.summary["step_ms_p50"] for run in runs),
        peak_bytes=peak,
        usd=None if cell.usd is None else cell.usd * cell.tokens_per_s / speed,
        by_phase_ms=_phases(runs),
        runs=ids,
    )


def peak_bytes(run: Record) -> int:
    """The device's peak of a run; on a CPU, where that is mostly libraries, what it can account for."""
    if "peak_gib" in run.summary:
        return round(run.summary["peak_gib"] * GIB)
    return round(run.summary["accounted_bytes"])


def _phases(runs: Sequence[Record]) -> dict[str, float]:
    """ms of the phases that a run has clocks for; what is exchanged and copied is within them."""
    keys = ("data", "forward", "backward", "communication", "optimizer")
    return {
        key: statistics.fmean(run.summary[f"{key}_ms"] for run in runs)
        for key in keys
        if all(f"{key}_ms" in run.summary for run in runs)
    }
