"""Which records are runs of the model, on the machine, that advice is asked about: they take the place of predictions.

A record counts for a combination at a micro-batch if it is of the same in all that time and memory depend on:

    model    shape and precision
    step     length, ranks, batches, engine, method, and whether rows are padded
    device   a card by its name and its memory; a CPU by its name and the threads of a rank
    links    what ranks talk over: at the rates of a network or not, with NVLink or without

A run that does not say one of these does not count. Repeats of one cell are taken together. What they say of other
cells is for `trials`.

Speed is measured by the time of a step. A run's tokens a second leave padding out, but a prediction, which reads no
data, counts every position: the ratio of the two would be that of padding.
"""

from __future__ import annotations

import dataclasses
import statistics
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

from llmsys import results, schema
from llmsys.bench.advise import space
from llmsys.bench.advise.cells import GIB, Cell, corrected
from llmsys.bench.advise.space import Candidate
from llmsys.bench.techniques import Techniques
from llmsys.cost import cards, case
from llmsys.cost.hardware import DEVICES
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


@dataclass(frozen=True, kw_only=True)
class Place:
    """The machine that is asked about, as far as a record can tell: a `card` of `cost.hardware.DEVICES`, or the one
    that was calibrated, by the `name` that its device reports; on a CPU with so many `threads` of a rank. `mem_gib`: of
    a card, or of the host."""

    mem_gib: float
    card: str = ""
    name: str = ""
    threads: int | None = None


@dataclass(frozen=True, kw_only=True)
class Found:
    """`runs` that count, and how many of the same combinations do not, by the reason."""

    runs: Runs = field(default_factory=dict)
    unlike: dict[str, int] = field(default_factory=dict)


def place(config: schema.Config) -> Place | None:
    """None of a card that is described by numbers: nobody can say which runs are on it."""
    speeds = space.advise(config).speeds
    if speeds is not None:
        from llmsys.bench.predict.machine import read as calibration

        made = calibration(speeds)
        on_cpu = made["config"]["hardware"]["device"] == "cpu"
        return Place(
            name=str(made["env"].get("device_name", "")).strip(),
            mem_gib=made["summary"]["mem_gib"],
            threads=made["config"]["train"]["threads"] if on_cpu else None,
        )
    if config.hardware.name == "auto":
        return None
    return Place(card=config.hardware.name, mem_gib=DEVICES[config.hardware.name].mem_gib)


def read(config: schema.Config, root: Path | None) -> list[Record]:
    """The runs below `root` of this model on this machine; none without a folder."""
    here = place(config)
    if root is None or here is None:
        return []
    return [record for record in results.read(root) if fits(config, record, here)]


def fits(config: schema.Config, record: Record, here: Place) -> bool:
    """Whether a record can be a cell of what is asked: training, how it ended, device and model."""
    if record.task != "train" or record.status not in ("ok", "oom") or not _on(here, record):
        return False
    if record.status == "ok" and "step_ms_p50" not in record.summary:
        return False
    ours, theirs = dataclasses.asdict(config.model), record.config.get("model", {})
    return all(theirs.get(key, value) == value for key, value in ours.items() if key not in NOT_THE_MODEL)


def _on(here: Place, record: Record) -> bool:
    """Whether a run was on this kind of device. The name alone is not enough: there are cards of two sizes."""
    name, gib = str(record.env.get("device_name", "")).strip(), record.env.get("device_memory_gib")
    if here.card:
        return gib is not None and cards.card(name, gib) == here.card
    if not name or name != here.name:
        return False
    return here.threads is not None or (gib is not None and abs(gib - here.mem_gib) <= cards.CLOSE * here.mem_gib)


def by_cell(config: schema.Config, candidates: Sequence[Candidate], records: Sequence[Record]) -> Found:
    """The records of each candidate, by micro-batch; what is none of them is left out."""
    here = place(config)
    if here is None:
        return Found()
    there = {(each.techniques, each.world): each for each in candidates}
    runs: Runs = {}
    unlike: Counter[str] = Counter()
    for record in records:
        typed = _typed(record) if fits(config, record, here) else None
        if typed is None:
            continue
        try:
            candidate = there.get((Techniques.of(typed), typed.train.world))
        except ValueError:  # settings that no combination stands for
            continue
        if candidate is None or not _same(config, candidate, typed):
            continue
        if why := _unlike(config, candidate, here, record, typed):
            unlike[why] += 1
        else:
            runs.setdefault(candidate, {}).setdefault(typed.train.micro_batch, []).append(record)
    return Found(runs=runs, unlike=dict(unlike))


def _unlike(config: schema.Config, candidate: Candidate, here: Place, record: Record, typed: schema.Config) -> str:
    """What else a run differs in that changes its time or memory: "" where there is nothing."""
    if here.threads is not None and typed.train.threads != here.threads:
        return "with other train.threads"
    if candidate.world > 1 and not _same_network(config.network, record, typed.network):
        return "over another network"
    if here.card and not _same_numbers(config.hardware, typed.hardware, candidate, here.card):
        return "with other numbers of hardware"
    if case.padded(typed) != case.padded(config):
        return "of padded rows" if case.padded(typed) else "of rows without padding"
    limited = typed.dispatch.memory_gib is not None or (config.hardware.mem_gib or 0) > here.mem_gib
    if record.status == "oom" and limited:
        return "that had less memory"
    if record.doubtful:
        return "that ran out of memory beside others"
    return ""


def _same_network(asked: schema.Network, record: Record, network: schema.Network) -> bool:
    """A run whose links could not be shaped was on the machine's own; of one that does not say nobody knows."""

    def rates(of: schema.Network) -> tuple[float | None, float | None, float]:
        return of.up_mbit, of.down_mbit, of.delay_ms

    if network.up_mbit is None:
        return asked.up_mbit is None
    shaped = record.env.get("network", {}).get("shaped")
    if shaped is None:
        return False
    return rates(network) == rates(asked) if shaped else asked.up_mbit is None


def _same_numbers(asked: schema.Hardware, given: schema.Hardware, candidate: Candidate, card: str) -> bool:
    """Numbers in the place of a card's own make another machine of it: those that the combination depends on."""
    keys = ["tflops", "mem_gbps", *(["gbps"] if candidate.world > 1 else [])]
    keys += ["nvlink"] if candidate.world > 1 and DEVICES[card].nvlink_ranks > 1 else []
    keys += ["host_gbps"] if candidate.techniques.offload else []
    return all(getattr(asked, key) == getattr(given, key) for key in keys)


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

    Tokens a second count padding, as those of every cell here do. One that ran out of memory makes it not fit; its
    other numbers are then still predicted ones. What ran does fit, unless the question is about less memory than the
    machine has (`capped`). On a CPU, whose peak is mostly libraries, the bytes of the device are predicted ones too.
    """
    ids = tuple(run.run_id for run in runs)
    if any(run.status != "ok" for run in runs):
        return dataclasses.replace(cell, fits=False, binds="memory", runs=ids)
    step_ms = statistics.fmean(run.summary["step_ms_p50"] for run in runs)
    peaks = [round(run.summary["peak_gib"] * GIB) for run in runs if "peak_gib" in run.summary]
    peak = max(peaks, default=cell.peak_bytes)
    return dataclasses.replace(
        corrected(cell, cell.step_ms / step_ms),
        correction=1.0,
        fits=not capped or peak <= cell.capacity_bytes,
        step_ms=step_ms,
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
