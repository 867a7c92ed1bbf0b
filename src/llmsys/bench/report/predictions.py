"""What each cell of a report is predicted to need and to take, by the config of its record and today's arithmetic,
beside what was measured; like with like.

    memory   on a GPU the fullest moment of a step, against the allocator's peak; on a CPU, where nothing counts what is
             alive, the sum of what is held and saved, against the same kinds as the run has counted them. Neither needs
             to know the machine
    time     of a step, by `llmsys.bench.predict`: on a machine that a record of `bench_calibrate` has measured, the
             same device and precision, else on the card by its datasheet. A CPU's ranks share its cores, so there the
             calibration is of as many ranks and threads; cells that it was made of itself are left out

A cell without a prediction has a reason. Records of training also hold the least that a step can take, by its
arithmetic and links at their peaks: a lower bound, said before the run, and no prediction.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass, field

from llmsys import schema
from llmsys.bench import cells
from llmsys.bench.cells import Cell
from llmsys.bench.predict import machine as machines
from llmsys.bench.predict.machine import Machine
from llmsys.bench.predict.prediction import predict
from llmsys.bench.workloads import Workload
from llmsys.cost import case as cases
from llmsys.cost import memory
from llmsys.job import Record

SEEN = ("precision", "world", "recompute", "loss", "optimizer", "fp8", "target_length")
"""Of `train`, beside batch and length: by which a cell is one that a calibration was made of."""


@dataclass(frozen=True, kw_only=True)
class Guess:
    """One number of a cell, predicted and measured."""

    cell: Cell
    predicted: float
    measured: float

    @property
    def error(self) -> float:
        """Percent of the measured value; positive where too much was predicted."""
        return 100 * (self.predicted / self.measured - 1)


@dataclass(frozen=True, kw_only=True)
class Guesses:
    """Of a workload: `memory` in bytes of a rank, `time` in ms of a step. `without_memory` and `without_time`: reason
    -> the cells that have no prediction for it. `sources`: how the speeds were come by."""

    memory: list[Guess] = field(default_factory=list)
    time: list[Guess] = field(default_factory=list)
    without_memory: dict[str, list[Cell]] = field(default_factory=dict)
    without_time: dict[str, list[Cell]] = field(default_factory=dict)
    sources: list[str] = field(default_factory=list)


def of(workload: Workload, records: Sequence[Record] = ()) -> Guesses:
    """Of all cells that were measured. `records`: among which calibrations are looked for."""
    found = Guesses()
    calibrations = [r for r in records if r.task == "bench_calibrate" and r.status == "ok"]
    for cell in workload.measured:
        try:
            if cell.memory is None:
                raise ValueError("no number for memory was measured (profile.probe=false)")
            found.memory.append(Guess(cell=cell, predicted=_bytes(cell), measured=cell.memory.mean))
        except ValueError as error:
            found.without_memory.setdefault(str(error), []).append(cell)
        try:
            config, machine = _placed(cell, calibrations)
            if (step := cell.of("step_ms_p50")) is None:
                raise ValueError("no time of a step was measured")
            found.time.append(Guess(cell=cell, predicted=predict(config, machine).step_ms, measured=step.mean))
            found.sources.extend(note for note in machine.notes[:1] if note not in found.sources)
        except (ValueError, KeyError) as error:  # a kind of operator that nobody has measured is a KeyError
            found.without_time.setdefault(str(error), []).append(cell)
    return found


def _bytes(cell: Cell) -> float:
    """Of a rank, as `Cell.memory` counts them. ValueError for settings of another version, and where what is computed
    again was chosen by the memory there was."""
    config = schema.build(cell.record.config)
    if config.train.recompute == "auto":
        raise ValueError("train.recompute=auto: chosen by the memory that there was, which the record does not say")
    parts = (config.model, config.train, config.method, config.engine)
    known = cases.facts(config, cell.kind)
    if cell.kind == "cuda":
        return memory.peak_bytes(*parts, **known)
    return sum(memory.estimate(*parts, **known).values())


def _placed(cell: Cell, calibrations: Sequence[Record]) -> tuple[schema.Config, Machine]:
    """(the config of a cell, the machine that it ran on). ValueError says why there is none."""
    config = schema.build(cell.record.config)
    if config.train.recompute == "auto":
        raise ValueError("train.recompute=auto: chosen by the memory that there was, which the record does not say")
    name, train = cells.device(cell.record), config.train
    fitting = [each for each in calibrations if cells.device(each) == name and _alike(each, config, cell.kind)]
    if fitting:
        best = max(fitting, key=lambda each: (each.world == train.world, each.started))
        if _seen(config, schema.build(best.config)):
            raise ValueError("the calibration was made of this cell itself")
        return config, machines.calibrated(dataclasses.asdict(best), config)
    if cell.card is None:
        ranks = f"train.world={train.world} train.threads={train.threads} in {train.precision}"
        raise ValueError(
            f"no calibration of {name} with {ranks} among the records: python -m llmsys +exp=bench_calibrate"
        )
    devices = max(train.world, int(cell.record.env.get("device_count", 1)))
    hardware = schema.Hardware(device=config.hardware.device, name=cell.card, devices=devices)
    config = dataclasses.replace(config, hardware=hardware)
    return config, machines.of(config)


def _alike(calibration: Record, config: schema.Config, kind: str) -> bool:
    """Whether a calibration's speeds are those of a run: same precision, and on a CPU as many ranks and threads."""
    theirs = calibration.config.get("train", {})
    train = config.train
    same = theirs.get("precision") == train.precision and f"peak_tflops/{train.precision}" in calibration.summary
    return same and (kind == "cuda" or (calibration.world == train.world and theirs.get("threads") == train.threads))


def _seen(config: schema.Config, theirs: schema.Config) -> bool:
    """Whether a run is one of the two cells that a calibration is made of: its own config, and that with a quarter of
    the length at micro-batch 1."""
    train, other = config.train, theirs.train
    groups = all(getattr(config, key) == getattr(theirs, key) for key in ("model", "method", "engine", "compress"))
    same = groups and all(getattr(train, key) == getattr(other, key) for key in SEEN)
    sizes = ((other.micro_batch, other.length), (1, max(16, other.length // 4)))
    return same and (train.micro_batch, train.length) in sizes and schema.accumulation(train, config.engine) == 1
