"""The record of `compress_convergence` as tables: loss at each rate; at equal steps, bytes and time; the targets.

Equal bytes are those that ACP-SGD of the targets' r sends in the whole run, equal time what the fastest needs for it.
What is reached by then is read off the curve of training loss, so it is loss in the middle of a schedule: a run that
was made for fewer steps would have come down from its high rates by then, and be a little better. The comparison at
equal bytes that the targets are about is between whole runs: ACP-SGD of 2 r sends in a step what Power-SGD of r does.
"""

from __future__ import annotations

import dataclasses
import re
import statistics
from collections.abc import Mapping
from pathlib import Path

import paired
import quality_table
from llmsys.job import Record
from quality_table import Line

BUDGET = "acpsgd"
"""Whose bytes of the whole run are everybody's at equal bytes."""
REFERENCES = ("ssgd", "powersgd")
MB = 1e6


@dataclasses.dataclass(frozen=True)
class Times:
    """Milliseconds of an iteration by method of `compress_iteration`, at twice the r by `<method>_2r`; `source`: of
    what network, variant and run."""

    source: dict[str, str]
    ms: Mapping[str, float]


@dataclasses.dataclass(frozen=True)
class Target:
    """`ours` minus `theirs`, over paired seeds. `must`: whether it has to be within the margin, or is reported only."""

    ours: str
    theirs: str
    what: str
    must: bool


TARGETS = (
    Target("acpsgd_2r", "powersgd", "equal bytes and steps", must=True),
    Target("acpsgd_2r", "ssgd", "equal steps", must=False),
    Target("acpsgd", "powersgd", "equal rank and steps, half the bytes", must=False),
    Target("acpsgd", "ssgd", "equal steps", must=False),
)


def times(folder: Path, variant: str) -> Times:
    """Of a record of `compress_iteration`, whose keys are <method>/<variant>/iteration_ms; the variant at twice the r
    (r=4: r=8) too, where it has that. ValueError where there is no record, or nothing of that variant."""
    record = Record.read(folder)
    if record is None:
        raise ValueError(f"{folder}: no record.json in it")
    ms: dict[str, float] = {}
    variants = set()
    twice = re.sub(r"\br=(\d+)", lambda found: f"r={2 * int(found[1])}", variant)
    for key, value in record.summary.items():
        method, _, rest = key.partition("/")
        name, _, what = rest.rpartition("/")
        if what == "iteration_ms":
            variants.add(name)
            ms |= {method: value} if name == variant else {f"{method}_2r": value} if name == twice else {}
    if variant not in variants:
        raise ValueError(f"--variant {variant}: {folder} has {', '.join(sorted(variants)) or 'no iteration_ms'}")
    network = record.config["network"]["name"]
    return Times({"network": network, "variant": variant, "run_id": record.run_id}, ms)


def at(curve: tuple[list[float], list[float]], step: float) -> float:
    """The loss of a curve (steps, losses) at `step`: between two points on a line, beyond its ends as there."""
    import numpy as np

    return float(np.interp(step, *curve))


def table(record: Record) -> str:
    """All of it as Markdown."""
    found = quality_table.lines(record)
    parts = [quality_table.rates(found, record.config["grid"], _number), _seeds(record, found), _targets(record, found)]
    if "times" not in record.config:
        parts.append("Without times of `compress_iteration` (`--times`) there is no column for equal time.")
    return "\n\n".join(part for part in parts if part)


def _seeds(record: Record, found: Mapping[str, Line]) -> str:
    if not any(line.by_seed for line in found.values()):
        return ""
    columns = [("equal bytes", _by_bytes(record, found)), ("equal time", _by_time(record, found))]
    columns = [(name, column) for name, column in columns if column]
    header = ["over paired seeds", "MB a step", "lr", "val loss at equal steps, mean ± sd (seeds)"]
    header += [f"minus {name} (90 %: ≤)" for name in REFERENCES]
    header += [f"training loss at {name}: {column['']}" for name, column in columns]
    rows = []
    for name, line in found.items():
        cells = [name, f"{line.numbers['bytes_per_step'] / MB:.3f}"]
        cells += [quality_table.chosen_rate(record.config["grid"], line), _result(line)]
        for other in REFERENCES:
            cells.append(_difference(line, found[other]) if other in found and other != name else "–")
        rows.append([*cells, *(column.get(name, "–") for _, column in columns)])
    return quality_table.markdown(header, rows)


def _by_bytes(record: Record, found: Mapping[str, Line]) -> dict[str, str]:
    """Contestant -> the loss that it has reached when each rank has sent as much as `BUDGET` does in all; under "" how
    much that is. Empty where that one has no curve."""
    curves = {name: _curve(record, name) for name in found}
    if BUDGET not in found or not curves[BUDGET][0]:
        return {}
    steps = record.config["steps"]
    whole = steps * found[BUDGET].numbers["bytes_per_step"]
    cells = {
        name: _reached(curves[name], whole / line.numbers["bytes_per_step"], steps)
        for name, line in found.items()
        if curves[name][0]
    }
    return {"": f"{whole / MB:.0f} MB (at step)", **cells}


def _by_time(record: Record, found: Mapping[str, Line]) -> dict[str, str]:
    """The same of time: what the fastest needs."""
    curves = {name: _curve(record, name) for name in found}
    ms = {name: line.numbers["iteration_ms"] for name, line in found.items() if "iteration_ms" in line.numbers}
    ms = {name: each for name, each in ms.items() if curves[name][0]}
    if not ms:
        return {}
    steps = record.config["steps"]
    whole = steps * min(ms.values())
    cells = {name: _reached(curves[name], whole / each, steps) for name, each in ms.items()}
    return {"": f"{whole / 1e3:.1f} s on {record.config['times']['network']} (at step)", **cells}


def _curve(record: Record, name: str) -> tuple[list[float], list[float]]:
    return record.samples[f"{name}/curve_steps"], record.samples[f"{name}/curve_loss"]


def _reached(curve: tuple[list[float], list[float]], step: float, steps: int) -> str:
    return f"{_number(at(curve, step))} ({'end' if step >= steps else f'{step:.0f}'})"


def _targets(record: Record, found: Mapping[str, Line]) -> str:
    margin = record.config["margin"]
    rows = []
    for target in TARGETS:
        if target.ours in found and target.theirs in found:
            ours, theirs = found[target.ours], found[target.theirs]
            good = paired.within(paired.difference(ours.by_seed, theirs.by_seed, higher=False), margin, higher=False)
            verdict = {None: "–", True: "yes", False: "no"}[good]
            names = f"{target.ours} - {target.theirs}"
            rows.append([names, target.what, _difference(ours, theirs), verdict if target.must else f"({verdict})"])
    header = ["validation loss", "at", "difference (90 %: ≤)", f"below +{margin:g} (in brackets: no target)"]
    return quality_table.markdown(header, rows) if rows else ""


def _difference(ours: Line, theirs: Line) -> str:
    d = paired.difference(ours.by_seed, theirs.by_seed, higher=False)
    return "–" if d is None else f"{d.mean:+.4f} ({'–' if d.bound is None else f'{d.bound:+.4f}'})"


def _result(line: Line) -> str:
    values = list(line.by_seed.values())
    if not values:
        return "–"
    return f"{_number(statistics.fmean(values))} ± {_number(paired.deviation(values))} ({len(values)})"


def _number(value: float | None) -> str:
    return "–" if value is None else f"{value:.4f}"
