"""Which records are runs of the model, on the machine, that advice is asked about: they take the place of predictions.

A record counts for a combination at a micro-batch if its settings are those that the combination stands for: shape and
precision, length, ranks, batches, engine, method. The device must call itself what `hardware` names. Repeats of one
cell are taken together. What they say of other cells is for `trials`.
"""

from __future__ import annotations

import dataclasses
import re
import statistics
from collections.abc import Sequence
from pathlib import Path

from llmsys import device, results, schema
from llmsys.bench.advise import space
from llmsys.bench.advise.cells import GIB, Cell, corrected
from llmsys.bench.advise.space import Candidate
from llmsys.bench.techniques import Techniques
from llmsys.cost.cards import REPORTED
from llmsys.job import Record

NOT_THE_MODEL = (
    *("name", "weights", "config", "tokenizer", "max_length", "norm_eps", "rope_theta", "pooling"),
    *("attention", "quant"),
)
"""Fields of a model that change neither time nor memory, and those that techniques say."""
STEP = (
    *("micro_batch", "global_batch", "length", "target_length", "precision", "world", "recompute", "loss"),
    *("optimizer", "fp8"),
)
"""Fields of `train` that do."""
Runs = dict[Candidate, dict[int, list[Record]]]
"""By micro-batch."""


def read(config: schema.Config, root: Path | None) -> list[Record]:
    """The runs below `root` of this model on this machine; none without a folder."""
    if root is None:
        return []
    name = named(config)
    if not name:
        return []
    return [record for record in results.read(root) if record.task == "train" and fits(config, record, name)]


def named(config: schema.Config) -> str:
    """A pattern of what the machine's device calls itself; "" where nobody can say."""
    given = config.hardware
    if given.name != "auto":
        return rf"(NVIDIA )?{REPORTED[given.name]}"
    if space.advise(config).speeds is not None:
        from llmsys.bench.predict.machine import read as calibration

        return re.escape(str(calibration(space.advise(config).speeds or "")["env"]["device_name"]))
    if given.mem_gib is not None and given.tflops is not None:
        return ""  # a card by its numbers
    return re.escape(device.resolve("cpu" if given.device == "cpu" else "auto")[1])


def fits(config: schema.Config, record: Record, name: str) -> bool:
    """Whether a record of training can be a cell of what is asked: model, device, and how it ended."""
    if record.status not in ("ok", "oom") or not re.fullmatch(name, str(record.env.get("device_name", "")).strip()):
        return False
    if record.status == "ok" and not {"tokens_per_s", "step_ms_p50"} <= record.summary.keys():
        return False
    ours, theirs = dataclasses.asdict(config.model), record.config.get("model", {})
    return all(theirs.get(key, value) == value for key, value in ours.items() if key not in NOT_THE_MODEL)


def by_cell(config: schema.Config, candidates: Sequence[Candidate], records: Sequence[Record]) -> Runs:
    """The records of each candidate, by micro-batch; what is none of them is left out."""
    there = {(each.techniques, each.world): each for each in candidates}
    found: Runs = {}
    for record in records:
        typed = _typed(record)
        if typed is None:
            continue
        try:
            candidate = there.get((Techniques.of(typed), typed.train.world))
        except ValueError:  # settings that no combination stands for
            continue
        if candidate is None or not _same(config, candidate, typed):
            continue
        found.setdefault(candidate, {}).setdefault(typed.train.micro_batch, []).append(record)
    return found


def _typed(record: Record) -> schema.Config | None:
    """The config of a record; None of one that other code wrote, which this one does not take."""
    try:
        return schema.build(record.config)
    except ValueError:
        return None


def _same(config: schema.Config, candidate: Candidate, typed: schema.Config) -> bool:
    """Whether a run has the settings of a candidate at its micro-batch, and the batch that is asked for."""
    asked = space.advise(config).global_batch
    if asked and typed.train.global_batch != asked:
        return False
    try:
        ours = space.configured(
            config,
            candidate.techniques,
            world=candidate.world,
            micro_batch=typed.train.micro_batch,
            global_batch=asked,
        )
    except ValueError:
        return False
    flat = schema.Transformer
    return (
        isinstance(typed.model, flat)
        and isinstance(ours.model, flat)
        and (typed.model.attention, typed.model.quant) == (ours.model.attention, ours.model.quant)
        and all(getattr(typed.train, key) == getattr(ours.train, key) for key in STEP)
        and (typed.engine, typed.method, typed.compress) == (ours.engine, ours.method, ours.compress)
    )


def measured(cell: Cell, runs: Sequence[Record], *, capped: bool) -> Cell:
    """`cell`, a prediction, with what its `runs`, repeats of one another, have measured: means, and the largest peak.

    One that ran out of memory makes it not fit; its other numbers are then still predicted ones. What ran does fit,
    unless the question is about less memory than the machine has (`capped`). On a CPU, whose peak is mostly libraries,
    the bytes of the device are predicted ones too.
    """
    ids = tuple(run.run_id for run in runs)
    if any(run.status != "ok" for run in runs):
        return dataclasses.replace(cell, fits=False, binds="memory", runs=ids)
    speed = statistics.fmean(run.summary["tokens_per_s"] for run in runs)
    peaks = [round(run.summary["peak_gib"] * GIB) for run in runs if "peak_gib" in run.summary]
    peak = max(peaks, default=cell.peak_bytes)
    return dataclasses.replace(
        corrected(cell, speed / cell.tokens_per_s),
        correction=1.0,
        fits=not capped or peak <= cell.capacity_bytes,
        step_ms=statistics.fmean(run.summary["step_ms_p50"] for run in runs),
        peak_bytes=peak,
        by_phase_ms=_phases(runs),
        runs=ids,
    )


def _phases(runs: Sequence[Record]) -> dict[str, float]:
    """ms of the phases that a run has clocks for; what is exchanged and copied is within them."""
    keys = ("data", "forward", "backward", "communication", "optimizer")
    return {
        key: statistics.fmean(run.summary[f"{key}_ms"] for run in runs)
        for key in keys
        if all(f"{key}_ms" in run.summary for run in runs)
    }
