"""The comparison of methods as pictures: results over memory, and over learning rates.

    comparisons(folder)     what the records under `folder` say, a family at a time
    over_memory(...)        the metric at each contestant's best rate over its accounted memory
    over_rates(...)         the metric on the tuning seed over the learning rate

A figure belongs to no window and no global state. ValueError where there is nothing to draw.
"""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import paired
import quality_table
from llmsys import results
from llmsys.job import Record
from quality_table import MIB, Line

QUALITY = "lorafa_quality"
RATES, SEEDS = "lorafa_minilm_lr", "lorafa_minilm_seeds"
ENCODER = {"name": "encoder", "metric": "accuracy", "unit": "%", "higher": True}
PERCENT = 100.0
MARKERS = "osD^vPX*"


@dataclass(frozen=True, kw_only=True)
class Comparison:
    """What was compared in one family. `family` is as the record has it: its name, metric, unit and `higher`."""

    family: dict[str, Any]
    lines: dict[str, Line]
    source: str

    @property
    def title(self) -> str:
        return f"{self.family['name']} ({self.source})"

    @property
    def label(self) -> str:
        better = "more" if self.family["higher"] else "less"
        return f"{self.family['metric']}, {self.family['unit']} ({better} is better)"


def comparisons(folder: Path) -> list[Comparison]:
    """Of every family with a run in the record of `lorafa_quality`. The encoder's, where that has none, are those of
    `lorafa_minilm_lr` and `lorafa_minilm_seeds`: fewer methods, rates and seeds, on peft's layers."""
    found = []
    if (folder / QUALITY).is_dir():
        record = quality_table.newest(folder / QUALITY)
        for family in record.config["families"].values():
            lines = {name: line for name, line in quality_table.lines(record, family["name"]).items() if line.by_rate}
            if lines:
                found.append(Comparison(family=family, lines=lines, source=QUALITY))
    if not any(each.family["name"] == ENCODER["name"] for each in found):
        runs = {name: results.read(folder / name) for name in (RATES, SEEDS)}
        lines = lines_of_runs(runs[RATES], runs[SEEDS])
        found.append(Comparison(family=ENCODER, lines=lines, source=f"{RATES}, {SEEDS}"))
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
            axes.errorbar(
                mib, statistics.fmean(values), yerr=paired.deviation(values), capsize=3, linestyle="", **style
            )
        elif (chosen := line.by_rate.get(line.numbers.get("lr", 0.0))) is not None:
            axes.plot(mib, chosen, linestyle="", markerfacecolor="none", **style)
        else:
            return False
        return True

    figure = _panels(found, draw)
    for axes in figure.axes:
        axes.set_xlabel("accounted memory, MiB")
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
