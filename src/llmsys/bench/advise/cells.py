"""One combination at one micro-batch on so many ranks: what a step of it takes, predicted, or measured in runs."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Protocol

from llmsys import schema
from llmsys.bench.techniques import Techniques

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
    accumulated; `usd` for a million tokens, None where no price is known. `runs`: of which runs the numbers are, none
    of a prediction; `binds` is always a predicted one. `correction`: how many times its predicted speed it is given, as
    runs of other cells suggest."""

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
    correction: float = 1.0

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


def corrected(cell: Cell, ratio: float) -> Cell:
    """`cell` at so many times its speed."""
    return dataclasses.replace(
        cell,
        tokens_per_s=cell.tokens_per_s * ratio,
        step_ms=cell.step_ms / ratio,
        usd=None if cell.usd is None else cell.usd / ratio,
        correction=cell.correction * ratio,
    )
