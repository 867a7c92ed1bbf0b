"""The comparison of methods as pictures: results over memory, and over learning rates.

    comparisons(records)    what these records say, a family at a time
    over_memory(...)        the metric at each contestant's best rate over its accounted memory
    over_rates(...)         the metric on the tuning seed over the learning rate

A figure belongs to no window and no global state. ValueError where there is nothing to draw.
"""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from llmsys import results
from llmsys.job import Record

MIB = 2**20

QUALITY = "lorafa_quality"
RATES, SEEDS = "lorafa_minilm_lr", "lorafa_minilm_seeds"
ENCODER = {"name": "encoder", "metric": "accuracy", "unit": "%", "higher": True}
PERCENT = 100.0
MARKERS = "osD^vPX*"


@dataclass(frozen=True)
class Line:
    """One contestant of one family, read back from the record."""

    name: str
    numbers: dict[str, float]
    by_rate: dict[float, float | None]
    by_seed: dict[int, float]
    finals: dict[float, float] = field(default_factory=dict)
    """Of the best rates, the mean over all tuning seeds."""


def lines(record: Record, family: str = "") -> dict[str, Line]:
    """Name -> contestant, in the order of the record; where a record has no families, of all of it."""
    found: dict[str, dict[str, float]] = {}
    for key, number in record.summary.items():
        of, _, name = key.rpartition("/")[0].rpartition("/")
        if of == family:
            found.setdefault(name, {})[key.rpartition("/")[2]] = number

    def sample(name: str, key: str) -> list[float]:
        return record.samples.get(f"{family}/{name}/{key}" if family else f"{name}/{key}", [])

    return {
        name: Line(
            name,
            numbers,
            dict(zip(sample(name, "rates"), sample(name, "by_rate"), strict=True))
            | dict.fromkeys(sample(name, "diverged")),
            {int(s): v for s, v in zip(sample(name, "seeds"), sample(name, "by_seed"), strict=True)},
            dict(zip(sample(name, "finalists"), sample(name, "by_finalist"), strict=True)),
        )
        for name, numbers in found.items()
    }


@dataclass(frozen=True, kw_only=True)
class Comparison:
    """What was compared in one family. `family` is as the record has it: its name, metric, unit and `higher`."""

    family: dict[str, Any]
    lines: dict[str, Line]
    source: str
    records: tuple[Record, ...] = ()
    """What it was read from."""

    @property
    def title(self) -> str:
        return f"{self.family['name']} ({self.source})"

    @property
    def label(self) -> str:
        better = "more" if self.family["higher"] else "less"
        return f"{self.family['metric']} ({self.family['unit']}; {better} is better)"


def newest(records: Sequence[Record]) -> Record:
    """Of the records of a comparison that with the most runs in it. ValueError where there is none."""
    found = [each for each in records if each.task == "benchmark"]
    if not found:
        raise ValueError("no record of a comparison among these")
    return max(found, key=lambda each: sum(len(values) for values in each.samples.values()))


def comparisons(records: Sequence[Record]) -> list[Comparison]:
    """Of every family with a run in the record of `lorafa_quality`. The encoder's, where that has none, are those of
    `lorafa_minilm_lr` and `lorafa_minilm_seeds`: fewer methods, rates and seeds, on peft's layers."""
    found = []
    compared = [record for record in records if record.name == QUALITY and record.task == "benchmark"]
    if compared:
        record = newest(compared)
        for family in record.config["families"].values():
            there = {name: line for name, line in lines(record, family["name"]).items() if line.by_rate}
            if there:
                found.append(Comparison(family=family, lines=there, source=QUALITY, records=(record,)))
    if not any(each.family["name"] == ENCODER["name"] for each in found):
        rates = [record for record in records if record.name == RATES]
        seeds = [record for record in records if record.name == SEEDS]
        if there := lines_of_runs(rates, seeds):
            source = f"{RATES}, {SEEDS}"
            found.append(Comparison(family=ENCODER, lines=there, source=source, records=(*rates, *seeds)))
    return found


def lines_of_runs(tuning: Sequence[Record], seeds: Sequence[Record]) -> dict[str, Line]:
    """Method -> contestant, of single runs: those on the tuning seed and those on the others, at the rate chosen."""
    found: dict[str, Line] = {}
    for run in sorted((results.row(each) for each in tuning), key=lambda row: row["lr"]):
        line = found.setdefault(run["method"], Line(run["method"], {}, {}, {}))
        line.by_rate[run["lr"]] = PERCENT * run["accuracy"] if run["status"] == "ok" else None
    for run in (results.row(each) for each in seeds if each.status == "ok"):
        line = found.setdefault(run["method"], Line(run["method"], {}, {}, {}))
        line.numbers.update({key: run[key] for key in ("lr", "r", "accounted_bytes") if run[key] is not None})
        line.by_seed[run["seed"]] = PERCENT * run["accuracy"]
    return found


def over_memory(found: Sequence[Comparison]) -> Any:
    """A panel a family: mean and standard deviation over seeds at the best rate, over accounted memory.

    Hollow where no seed but the one that the rate was chosen on has been run: that one is flattered by the choice.
    """

    def draw(axes: Any, line: Line, style: dict[str, Any]) -> bool:
        mib = line.numbers.get("accounted_bytes", 0.0) / MIB
        if line.by_seed:
            values = list(line.by_seed.values())
            deviation = statistics.stdev(values) if len(values) > 1 else None
            axes.errorbar(mib, statistics.fmean(values), yerr=deviation, capsize=3, linestyle="", **style)
        elif (chosen := line.by_rate.get(line.numbers.get("lr", 0.0))) is not None:
            axes.plot(mib, chosen, linestyle="", markerfacecolor="none", **style)
        else:
            return False
        return True

    figure = _panels(found, draw)
    for axes in figure.axes:
        axes.set_xlabel("accounted memory (MiB)")
        axes.margins(0.1)
    return figure


def over_rates(found: Sequence[Comparison]) -> Any:
    """A panel a family: results on the tuning seed; the chosen rate is ringed. A run that diverged has no point."""

    def draw(axes: Any, line: Line, style: dict[str, Any]) -> bool:
        points = sorted((rate, value) for rate, value in line.by_rate.items() if value is not None)
        if not points:
            return False
        axes.plot(*zip(*points, strict=True), linewidth=1, **style)
        for rate, value in points:
            if rate == line.numbers.get("lr"):
                axes.plot(rate, value, "o", markersize=11, markerfacecolor="none", color=style["color"])
        return True

    figure = _panels(found, draw)
    for axes in figure.axes:
        axes.set(xscale="log", xlabel="learning rate")
    return figure


def _panels(found: Sequence[Comparison], draw: Any) -> Any:
    """One panel a comparison; `draw(axes, line, style)` says whether there was anything to draw of that line."""
    from matplotlib import colormaps
    from matplotlib.figure import Figure

    if not found:
        raise ValueError("no comparison to draw: run python benchmarks/lorafa_quality.py --keep")
    figure = Figure(figsize=(6.0 * len(found), 5.0), layout="constrained")
    names = list(dict.fromkeys(name for each in found for name in each.lines))
    for axes, each in zip(figure.subplots(1, len(found), squeeze=False)[0], found, strict=True):
        drawn = False
        for name, line in each.lines.items():
            place = names.index(name)
            style = {"color": colormaps["tab10"](place % 10), "marker": MARKERS[place % len(MARKERS)]}
            label = f"{name}, r={line.numbers['r']:.0f}" if "r" in line.numbers else name
            drawn |= draw(axes, line, {**style, "label": label})
        if not drawn:
            raise ValueError(f"{each.title}: no contestant has a result")
        axes.set_title(each.title, fontsize=10)
        axes.set_ylabel(each.label)
        axes.grid(alpha=0.3)
        axes.legend(fontsize=8)
    return figure
