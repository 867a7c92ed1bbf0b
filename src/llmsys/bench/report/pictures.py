"""The report's charts for notebooks: the same numbers, drawn by matplotlib.

Each function reads nothing but its argument and returns a figure that no window or global state knows of. ValueError
where there is nothing to draw.
"""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence
from typing import Any

from llmsys.bench.cells import GIB, Cell
from llmsys.bench.modules import tables
from llmsys.bench.report import ablation, front, paper, predictions
from llmsys.bench.report.common import family, size
from llmsys.bench.report.style import LIGHT
from llmsys.bench.workloads import Workload
from llmsys.job import Record

FAR = 20
"""Times the smallest, the largest is so far that axes are logarithmic."""
KINDS = ("forward", "backward", "recompute", "other")


def over_memory(workload: Workload) -> Any:
    """Tokens/s over memory of a rank: all cells, those on the front named, and the front as a line. Bars are half the
    95 % interval, of cells with repeats."""
    cells = front.drawable(workload.measured)
    if not cells:
        raise ValueError(f"{workload.title}: no cell has speed and memory; python -m llmsys sweep=bench_pretrain_grid")
    figure, axes = _figure(7.5, 4.5)
    for name in dict.fromkeys(family(cell)[0] for cell in sorted(cells, key=lambda cell: family(cell)[1])):
        mine = [cell for cell in cells if family(cell)[0] == name]
        axes.errorbar(
            [_gib(cell) for cell in mine],
            [_tokens(cell) for cell in mine],
            yerr=[cell.tokens.half if cell.tokens else 0.0 for cell in mine],
            fmt="o",
            capsize=3,
            color=LIGHT[family(mine[0])[1]],
            label=name,
        )
    best = front.front(cells)
    axes.step([_gib(cell) for cell in best], [_tokens(cell) for cell in best], "--", where="post", color="grey", lw=1)
    for cell in best:
        axes.annotate(cell.label, (_gib(cell), _tokens(cell)), (6, -12), textcoords="offset points", fontsize=8)
    axes.set_xlabel(f"{workload.memory_name} of a rank (GiB)")
    axes.set_ylabel("tokens/s, all ranks")
    axes.set_ylim(bottom=0)
    axes.margins(x=0.12)
    axes.grid(alpha=0.3)
    axes.legend(fontsize=8)
    axes.set_title(workload.title, fontsize=9)
    return figure


def letters(workload: Workload) -> Any:
    """What each letter does: pairs of cells that differ in it alone as points, their mean as a diamond with its 95 %
    interval; speed and memory."""
    found = [
        (name, effects)
        for name, effects in (
            ("tokens/s (%)", ablation.effects(workload, lambda cell: cell.tokens)),
            ("memory of a rank (%)", ablation.effects(workload, lambda cell: cell.memory)),
        )
        if effects
    ]
    if not found:
        raise ValueError(
            f"{workload.title}: no two cells differ in one letter; python -m llmsys sweep=bench_pretrain_grid"
        )
    figure, grid = _figure(4.5 * len(found), 0.8 + 0.4 * max(len(effects) for _, effects in found), len(found))
    for axes, (name, effects) in zip(grid if len(found) > 1 else [grid], found, strict=True):
        names = [effect.letter for effect in effects]
        values = [pair.ratio.percent for effect in effects for pair in effect.pairs]
        axes.axvline(0, color="grey", lw=1)
        for y, effect in enumerate(effects):
            if effect.mean.low is not None and effect.mean.high is not None:
                axes.hlines(y, effect.mean.low, effect.mean.high, color="black", lw=1.5)
            axes.plot(
                [pair.ratio.percent for pair in effect.pairs], [y] * len(effect.pairs), "o", color=LIGHT[0], alpha=0.6
            )
            axes.plot([effect.mean.percent], [y], "D", color="black", ms=5)
        limit = 1.6 * max(map(abs, values), default=1.0) or 1.0  # of two pairs that disagree an interval has no end
        low, high = axes.get_xlim()
        axes.set_xlim(max(low, -limit), min(high, limit))
        axes.set_yticks(range(len(names)), names)
        axes.invert_yaxis()
        axes.margins(y=0.2)
        axes.set_xlabel(name)
        axes.grid(alpha=0.3, axis="x")
    return figure


def phases(workload: Workload) -> Any:
    """A step of each cell by its phases, the fastest on top; bars are the quartiles of whole steps around the end."""
    found = [(cell, parts) for cell in workload.measured if (parts := paper.phases(cell))]
    if not found:
        raise ValueError(f"{workload.title}: no cell has times of phases")
    found.sort(key=lambda each: -_tokens(each[0]))
    several = len({size(cell) for cell, _ in found}) > 1
    names = [f"{cell.label}, {size(cell)}" if several else cell.label for cell, _ in found]
    kinds = [name for name in (*paper.PHASES, "other") if any(name in parts for _, parts in found)]
    rows = [[parts.get(kind, 0.0) for kind in kinds] for _, parts in found]
    steps = [[ms for record in cell.records for ms in record.samples.get("step_ms", [])] for cell, _ in found]
    return _bars(names, kinds, rows, "ms of a step", workload.title, steps)


def modules(record: Record) -> Any:
    """A step by its modules, of one record of bench_modules; bars are the quartiles over steps."""
    rows = tables.rows(record.summary)
    if not rows:
        raise ValueError(f"{record.run_id}: has no modules; python -m llmsys +exp=bench_modules")
    parts = []
    for row in rows:
        mine = [record.summary.get(f"modules/{row}/{kind}_ms", 0.0) for kind in KINDS[:-1]]
        parts.append([*mine, 0.0 if any(mine) else record.summary[f"modules/{row}/ms"]])
    title = f"{record.config['model']['name']}, {record.summary['attributed_percent']:.1f} % of the step attributed"
    return _bars(rows, KINDS, parts, "ms of a step", title, [_steps(record.samples, row) for row in rows])


def _steps(samples: Mapping[str, Sequence[float]], row: str) -> list[float]:
    """ms of a module in each step, of all its passes together; [] where steps were not looked at alike."""
    found = [values for key, values in samples.items() if key.startswith(f"modules/{row}/")]
    return [sum(step) for step in zip(*found, strict=True)] if len({len(values) for values in found}) == 1 else []


def predicted(workload: Workload, records: Sequence[Record] = ()) -> Any:
    """Predicted against measured (`predictions`): memory of a rank and, where the card is listed or `records` has a
    calibration, time of a step, on logarithmic axes where values are far apart. The line is equality. Bars are half the
    95 % interval, of cells with repeats."""
    guesses = predictions.of(workload, records)
    found = [
        (name, [(one.measured * scale, one.predicted * scale, one.cell, _half(one.cell, key) * scale) for one in them])
        for name, scale, them, key in (
            (f"{workload.memory_name} of a rank (GiB)", 1 / GIB, guesses.memory, ""),
            ("time of a step (ms)", 1.0, guesses.time, "step_ms_p50"),
        )
        if them
    ]
    if not found:
        raise ValueError(f"{workload.title}: no cell has a prediction")
    figure, grid = _figure(4.5 * len(found), 4.0, len(found))
    for axes, (name, points) in zip(grid if len(found) > 1 else [grid], found, strict=True):
        ends = [value for x, y, *_ in points for value in (x, y)]
        axes.plot([min(ends), max(ends)], [min(ends), max(ends)], "-", color="grey", lw=1)
        for each in sorted({family(point[2])[1] for point in points}):
            mine = [point for point in points if family(point[2])[1] == each]
            label = family(mine[0][2])[0]
            x, y, _, halves = zip(*mine, strict=True)
            axes.errorbar(x, y, xerr=halves, fmt="o", capsize=2, color=LIGHT[each], label=label)
        if max(ends) > FAR * min(ends):
            axes.set_xscale("log")
            axes.set_yscale("log")
        axes.set_xlabel(f"measured {name}")
        axes.set_ylabel(f"predicted {name}")
        axes.grid(alpha=0.3, which="both")
        axes.legend(fontsize=8)
    return figure


def _half(cell: Cell, key: str) -> float:
    """Half the 95 % interval of a number of the summary over repeats; without a key of its memory."""
    found = cell.of(key) if key else cell.memory
    return found.half if found else 0.0


def _bars(
    names: Sequence[str],
    kinds: Sequence[str],
    rows: Sequence[Sequence[float]],
    unit: str,
    title: str,
    repeats: Sequence[Sequence[float]],
) -> Any:
    """`repeats`: of each row the values whose quartiles are drawn around its end."""
    figure, axes = _figure(7.5, 1.2 + 0.28 * len(names))
    starts = [0.0] * len(names)
    for index, kind in enumerate(kinds):
        widths = [row[index] for row in rows]
        if any(widths):
            axes.barh(range(len(names)), widths, left=starts, color=LIGHT[index % len(LIGHT)], height=0.75, label=kind)
            starts = [start + width for start, width in zip(starts, widths, strict=True)]
    for y, (end, values) in enumerate(zip(starts, repeats, strict=True)):
        right = end
        if len(values) > 1:
            low, _, right = statistics.quantiles(values, n=4)
            axes.errorbar((low + right) / 2, y, xerr=(right - low) / 2, fmt="none", ecolor="black", capsize=2)
        axes.text(max(end, right), y, f" {end:,.1f}", va="center", fontsize=8)
    axes.set_yticks(range(len(names)), names, fontsize=8)
    axes.invert_yaxis()
    axes.margins(x=0.12)
    axes.set_xlabel(unit)
    axes.legend(fontsize=8)
    axes.set_title(title, fontsize=9)
    return figure


def _figure(width: float, height: float, columns: int = 1) -> tuple[Any, Any]:
    """A figure that pyplot does not hold on to, and its panels."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width, height), layout="constrained")
    return figure, figure.subplots(1, columns)


def _gib(cell: Cell) -> float:
    assert cell.memory is not None
    return cell.memory.mean / GIB


def _tokens(cell: Cell) -> float:
    assert cell.tokens is not None
    return cell.tokens.mean
