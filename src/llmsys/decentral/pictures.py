"""Plans, simulations and comparisons as pictures: figures that no window or global state knows of."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from llmsys.decentral.schedule import Span

if TYPE_CHECKING:
    from llmsys.job import Record

COLOURS = {"F": "#4c72b0", "B": "#dd8452", "ahead": "#8fb0d9", "back": "#f0c09c"}
NAMES = {"F": "forward", "B": "backward", "ahead": "activations on the line", "back": "gradients on the line"}
NUMBERED = 12
"""Micro-batches up to which bars have their number."""


def gantt(spans: Sequence[Span], names: Sequence[str]) -> Any:
    """A row for each stage, the first on top; what a stage sends below what it computes. Needs matplotlib."""
    from matplotlib.figure import Figure
    from matplotlib.patches import Patch

    count = len(names)
    figure = Figure(figsize=(9, 1.2 + 0.45 * count), layout="constrained")
    axes = figure.add_subplot()
    scale = 1e3
    few = max((span.micro_batch for span in spans), default=0) < NUMBERED
    for what in COLOURS:
        mine = [span for span in spans if span.what == what]
        low, height = (0.0, 0.5) if what in "FB" else (-0.35, 0.25)
        axes.barh(
            [count - 1 - span.stage + low for span in mine],
            [(span.end_s - span.begin_s) * scale for span in mine],
            left=[span.begin_s * scale for span in mine],
            height=height,
            align="edge",
            color=COLOURS[what],
            edgecolor="white",
            linewidth=0.3,
        )
        for span in mine if few and what in "FB" else ():
            middle, height = (span.begin_s + span.end_s) / 2 * scale, count - 1 - span.stage + 0.25
            axes.text(middle, height, str(span.micro_batch), ha="center", va="center", fontsize=6)
    axes.set_yticks([count - 1 - stage + 0.1 for stage in range(count)], names)
    axes.set_xlabel("time (ms)")
    axes.set_ylim(-0.6, count - 0.2)
    used = [what for what in COLOURS if any(span.what == what for span in spans)]
    handles = [Patch(color=COLOURS[what], label=NAMES[what]) for what in used]
    axes.legend(handles=handles, loc="lower center", bbox_to_anchor=(0.5, 1.0), ncols=len(used), frameon=False)
    return figure


def of_record(record: Record) -> Any:
    """`gantt` of a run of `decentral_plan`. ValueError for another's record."""
    columns = [record.samples.get(f"gantt/{key}") for key in ("stage", "what", "micro_batch", "begin_ms", "end_ms")]
    if None in columns:
        raise ValueError(f"{record.name} {record.run_id}: no run of decentral_plan that ended well")
    kinds = list(COLOURS)
    rows = zip(*(column for column in columns if column is not None), strict=True)
    spans = [Span(int(s), kinds[int(w)], int(m), begin / 1e3, end / 1e3) for s, w, m, begin, end in rows]
    return gantt(spans, [f"stage {at}" for at in range(max(span.stage for span in spans) + 1)])


def columns_of(spans: Sequence[Span]) -> dict[str, list[float]]:
    """`spans` as a record's samples."""
    kinds = list(COLOURS)
    return {
        "gantt/stage": [span.stage for span in spans],
        "gantt/what": [kinds.index(span.what) for span in spans],
        "gantt/micro_batch": [span.micro_batch for span in spans],
        "gantt/begin_ms": [span.begin_s * 1e3 for span in spans],
        "gantt/end_ms": [span.end_s * 1e3 for span in spans],
    }


def goodput(records: Sequence[Record]) -> Any:
    """Of `decentral_simulate`: goodput over the mean time between failures: each run a point, a line through the means,
    with standard deviations. Needs matplotlib."""
    import statistics

    from matplotlib.figure import Figure

    figure = Figure(figsize=(7, 4), layout="constrained")
    axes = figure.add_subplot()
    for record in records:
        points = {
            float(key.partition("/")[2].removesuffix("s")): values
            for key, values in record.samples.items()
            if key.startswith("goodput_percent/")
        }
        times = sorted(points)
        mean = [statistics.fmean(points[mtbf]) for mtbf in times]
        sd = [statistics.stdev(points[mtbf]) if len(points[mtbf]) > 1 else 0.0 for mtbf in times]
        task = record.config["task"]
        label = f"{record.config['model']['name']}, {task['providers']} of {task['fleet']}"
        (line, *_) = axes.errorbar(times, mean, yerr=sd, marker="D", capsize=3, label=label)
        for mtbf, values in points.items():
            axes.plot([mtbf] * len(values), values, "o", ms=3, alpha=0.5, color=line.get_color())
    axes.set_xscale("log")
    axes.set_xlabel("mean time between a provider's failures (s)")
    axes.set_ylabel("goodput (% of the plan's throughput)")
    axes.set_ylim(0, 105)
    axes.grid(alpha=0.3)
    axes.legend()
    return figure


def against(record: Record) -> Any:
    """Of `benchmarks/decentral_plans.py`: a plan's throughput over the best baseline's, fleet by fleet. Needs
    matplotlib."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(7, 4), layout="constrained")
    axes = figure.add_subplot()
    kinds = [key.partition("/")[0] for key in record.samples if key.endswith("/baseline_per_s")]
    for at, kind in enumerate(kinds):
        pairs = zip(record.samples[f"{kind}/per_s"], record.samples[f"{kind}/baseline_per_s"], strict=True)
        ratios = sorted(own / other for own, other in pairs if other)
        axes.plot([at + (k + 0.5) / len(ratios) * 0.8 - 0.4 for k in range(len(ratios))], ratios, ".", ms=4)
        if ratios:
            axes.hlines(ratios[len(ratios) // 2], at - 0.4, at + 0.4, color="black", lw=1)
    axes.axhline(1.0, color="black", lw=0.8, ls=":")
    axes.set_xticks(range(len(kinds)), kinds)
    axes.set_yscale("log")
    axes.set_ylabel("micro-batches/s over the best baseline's (times)")
    axes.grid(alpha=0.3, axis="y", which="both")
    return figure


def curves(
    rates_mbit: Sequence[float],
    by_name: Mapping[str, Sequence[float]],
    parity: float | None = 1.0,
    between: Mapping[str, tuple[Sequence[float], Sequence[float]]] | None = None,
) -> Any:
    """Throughput of the small cards over that of the large ones, over the rate of their lines. `between`: of a name the
    lowest and the highest values, as a band. Needs matplotlib."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(7, 4.2), layout="constrained")
    axes = figure.add_subplot()
    for name, ratios in by_name.items():
        (line,) = axes.plot(rates_mbit, ratios, marker="o", ms=3, label=name)
        if between and name in between:
            axes.fill_between(rates_mbit, *between[name], color=line.get_color(), alpha=0.12, lw=0)
    if parity is not None:
        axes.axhline(parity, color="black", lw=0.8, ls=":")
    axes.set_xscale("log")
    axes.set_yscale("log")
    axes.set_xlabel("line (Mbit/s)")
    axes.set_ylabel("throughput over the large cards' (times)")
    axes.grid(alpha=0.3, which="both")
    axes.legend()
    return figure


def over_lines(records: Sequence[Record]) -> Any:
    """`curves` of runs of `decentral_perf`, one a run: the middle of the efficiencies that were assumed, and all of
    them as a band. ValueError where no run has any."""
    compared = sorted(
        (record for record in records if "curve/mbit" in record.samples),
        key=lambda record: (record.config["task"]["train"], record.summary["critical_mbit"]),
    )
    if not compared:
        raise ValueError("no run has a curve over lines: run python -m llmsys +exp=decentral_3080_vs_h100")
    middles, between = {}, {}
    for record in compared:
        large = next(key.removesuffix("_low") for key in reversed(record.samples) if key.endswith("_low"))
        low, high = record.samples[f"{large}_low"], record.samples[f"{large}_high"]
        name = f"{record.config['model']['name']}, {'training' if record.config['task']['train'] else 'forward'}"
        middles[name] = [(a * b) ** 0.5 for a, b in zip(low, high, strict=True)]
        between[name] = (low, high)
    return curves(compared[0].samples["curve/mbit"], middles, between=between)


def save(figure: Any, path: Path) -> None:
    figure.savefig(path, dpi=150)
