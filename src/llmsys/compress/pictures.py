"""Records of compression as pictures: what an iteration consists of, speed over the link's rate, and convergence.

Each function takes records, reads nothing else, and returns a matplotlib figure that no window or global state knows
of. ValueError where the records have nothing to draw.
"""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence
from typing import Any

from llmsys.compress.measure import figures, tables
from llmsys.compress.measure.variants import Variant
from llmsys.compress.paper_models import MODELS
from llmsys.compress.simulate.predict import RATES_GBIT
from llmsys.job import Record
from llmsys.schema.measured import NOOP

FAR = 3.0
"""So many times longer than the median, a bar runs out of its panel."""
UNKNOWN = "#b5b5b5"
PARTS = {
    "passes and update": "#4c72b0",
    "compression": "#dd8452",
    "exposed decompression": "#e8b384",
    "exposed communication": "#c44e52",
}
COLOURS = {
    "none": "#333333",
    "fp16": "#937860",
    "sign": "#8172b3",
    "efsign": "#b39ddb",
    "topk": "#55a868",
    "randomk": "#a5d6a7",
    "powersgd_packed": "#e8b384",
    "powersgd": "#dd8452",
    "acpsgd": "#c44e52",
    "torch_powersgd": "#b5b5b5",
}


def breakdown(records: Sequence[Record]) -> Any:
    """Iterations of `compress_iteration` by their parts, a panel for each record: link and number of ranks. The line is
    the larger of computation and what the link takes at its nominal rate; error bars are the quartiles of iterations.
    Bars that are far longer than the others run out of the panel, with their length in ms."""
    panels = [(record, rows) for record in records for rows in tables.cells(record.summary).values()]
    if not panels:
        raise ValueError("no record has iterations: run python -m llmsys +exp=compress_iteration")
    figure, grid = _grid(len(panels), 6.0, 3.4)
    for axes, (record, rows) in zip(grid, panels, strict=False):
        _bars(axes, rows)
        axes.set_title(f"{record.config['network']['name']}, {record.world} ranks", fontsize=10)
    for axes in grid[len(panels) :]:
        axes.set_visible(False)
    from matplotlib.patches import Patch

    parts = {**PARTS, "torch's hook, all of it": UNKNOWN}
    handles = [Patch(color=colour, label=part) for part, colour in parts.items()]
    figure.legend(handles=handles, loc="outside upper center", ncols=5 if len(panels) > 1 else 3)
    return figure


def _bars(axes: Any, rows: Mapping[str, Mapping[str, float]]) -> None:
    shown = {name: row for name, row in rows.items() if not name.startswith(NOOP)}
    medians = {Variant.parse(name): row["iteration_ms"] for name, row in rows.items()}
    passes = {name: figures.noop_s(medians, Variant.parse(name)) for name in shown}
    labels = [_label(Variant.parse(name), [Variant.parse(each) for each in shown]) for name in shown]
    starts = [0.0] * len(shown)
    keys = (None, "compress_ms", "decompress_exposed_ms", "exposed_ms")
    for (_, colour), key in zip(PARTS.items(), keys, strict=True):
        widths = [max(0.0, row.get(key, 0.0)) if key else passes[name] for name, row in shown.items()]
        axes.barh(labels, widths, left=starts, color=colour, height=0.75)
        starts = [start + width for start, width in zip(starts, widths, strict=True)]
    limit = min(max(starts), FAR * statistics.median(starts)) * 1.15
    axes.set_xlim(0, limit)
    for y, (name, row) in enumerate(shown.items()):
        if "exposed_ms" not in row:  # torch's hook: of its rest nobody knows what it is
            axes.barh([labels[y]], [row["iteration_ms"] - passes[name]], left=passes[name], color=UNKNOWN, height=0.75)
            starts[y] = row["iteration_ms"]
    for y, row in enumerate(shown.values()):
        out = starts[y] > limit
        low, high = (row.get(f"iteration_ms_{end}", row["iteration_ms"]) for end in ("p25", "p75"))
        if high > low and high < limit:
            axes.errorbar((low + high) / 2, y, xerr=(high - low) / 2, fmt="none", ecolor="black", capsize=2, lw=0.8)
        where, side = (limit, "right") if out else (min(max(starts[y], high), limit), "left")
        axes.text(
            where,
            y,
            f" {row['iteration_ms']:,.0f} ",
            va="center",
            ha=side,
            fontsize=8,
            color="white" if out else "black",
        )
        if row.get("bound_ms", limit) < limit:
            axes.vlines(row["bound_ms"], y - 0.45, y + 0.45, color="black", linewidth=1.5)
    axes.invert_yaxis()
    axes.margins(y=0.02)
    axes.tick_params(labelsize=8)
    axes.set_xlabel("time of an iteration (ms)")
    axes.spines[["top", "right"]].set_visible(False)


def _label(variant: Variant, among: Sequence[Variant]) -> str:
    """The method, and of its settings those that differ among the variants of one method."""
    alike = [each for each in among if each.method == variant.method]
    said = [variant.method]
    if len({each.bucket_mib for each in alike}) > 1:
        said.append(f"{variant.bucket_mib:g} MiB" if variant.bucket_mib else "no fusion")
    if len({each.overlap for each in alike}) > 1:
        said.append("overlap" if variant.overlap else "no overlap")
    said += [f"r={variant.r}"] if len({each.r for each in alike}) > 1 else []
    said += [f"batch {variant.batch}"] if len({each.batch for each in alike}) > 1 else []
    return ", ".join(said)


def over_rate(record: Record, world: int = 32) -> Any:
    """How many times faster than S-SGD each method is, over the rate of the links between machines, as
    `compress_simulate` predicts it: a panel a model. A ring marks where a method stops to pay."""
    rates = record.samples.get("curve/gbit")
    found: dict[str, dict[str, list[float]]] = {}
    for key, values in record.samples.items():
        parts = key.split("/")
        if len(parts) == 4 and parts[2] == str(world):
            found.setdefault(parts[1], {})[parts[3].removesuffix("_ms")] = values
    if not rates or not found:
        raise ValueError(f"the record has no curves of {world} GPUs: run python -m llmsys +exp=compress_simulate")
    figure, grid = _grid(len(found), 5.0, 3.6)
    for axes, (model, curves) in zip(grid, found.items(), strict=False):
        for method, ms in curves.items():
            faster = [plain / own for plain, own in zip(curves["none"], ms, strict=True)]
            axes.plot(rates, faster, color=COLOURS[method], label=method, linewidth=1.5)
            even = record.summary.get(f"break_even/{model}/{world}/{method}_gbit", 0.0)
            if RATES_GBIT[0] < even < RATES_GBIT[1]:
                axes.plot([even], [1.0], "o", color=COLOURS[method], markersize=7, markerfacecolor="none")
        axes.set_xscale("log")
        axes.set_yscale("log")
        axes.set_title(f"{MODELS[model].title}, {world} GPUs", fontsize=10)
        axes.set_xlabel("rate between machines (Gbit/s)")
        axes.grid(alpha=0.3)
        axes.set_ylabel("speed over S-SGD's (times)")
    for axes in grid[len(found) :]:
        axes.set_visible(False)
    handles, labels = grid[0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside upper center", ncols=5)
    return figure


def convergence(record: Record) -> Any:
    """Of `compress_convergence`: training loss over steps, and over what a rank sends, a curve a contestant, the mean
    of its seeds; and the validation loss at the end, mean and standard deviation over seeds."""
    curves = {
        key.removesuffix("/curve_steps"): (steps, record.samples[key.replace("curve_steps", "curve_loss")])
        for key, steps in record.samples.items()
        if key.endswith("/curve_steps")
    }
    if not curves:
        raise ValueError("the record has no curves: run python benchmarks/compress_convergence.py")
    figure, (left, right, ends, empty) = _grid(4, 6.0, 4.2)
    empty.set_visible(False)
    for name, (steps, loss) in curves.items():
        sent = record.summary[f"{name}/bytes_per_step"]
        (line,) = left.plot(steps, loss, label=name, linewidth=1.5)
        right.plot([step * sent / 1e6 for step in steps], loss, label=name, linewidth=1.5)
        if values := record.samples.get(f"{name}/by_seed"):
            deviation = statistics.stdev(values) if len(values) > 1 else 0.0
            ends.errorbar(statistics.fmean(values), name, xerr=deviation, fmt="o", capsize=3, color=line.get_color())
    ends.set_xlabel("validation loss at the end (nats a token)")
    ends.invert_yaxis()
    left.set_xlabel("training (steps)")
    right.set_xlabel("sent by a rank (MB)")
    right.set_xscale("log")
    for axes in (left, right):
        axes.set_ylabel("training loss (nats a token)")
    for axes in (left, right, ends):
        axes.grid(alpha=0.3)
    figure.legend(*left.get_legend_handles_labels(), loc="outside upper center", ncols=5)
    return figure


def _grid(panels: int, width: float, height: float) -> tuple[Any, list[Any]]:
    from matplotlib.figure import Figure

    columns = min(panels, 2)
    rows = -(-panels // columns)
    figure = Figure(figsize=(width * columns, height * rows), layout="constrained")
    return figure, list(figure.subplots(rows, columns, squeeze=False).flat)
