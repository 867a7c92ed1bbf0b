"""A ledger's record as pictures: bytes of a block as stacked bars, and memory of whole models over batch and length.

Each function takes records of `lorafa_ledger`, reads nothing but their summaries, and returns a matplotlib figure that
no window or global state knows of. ValueError where the records have nothing to draw.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from llmsys.job import Record
from llmsys.lorafa.ledger.tables import ORIGINS, SHOWN
from llmsys.schema.task import COLUMNS

GB = 1e9
COLOURS = ("#4c72b0", "#dd8452", "#55a868", "#c44e52", "#8172b3", "#937860", "#b5b5b5")
"""Of the origins, in their order."""
POLICY_COLOURS = {"none": "#4c72b0", "mlp": "#55a868", "attn+mlp": "#c44e52", "block": "#8172b3"}
PEER_STYLES: dict[str, dict[str, Any]] = {
    "full": {"color": "#333333", "linestyle": ":"},
    "peft_lora": {"color": "#dd8452", "linestyle": ":"},
    "peft_lora_bf16": {"color": "#b8a000", "linestyle": ":"},
    "peft_lorafa": {"color": "#e377c2", "linestyle": ":"},
}


def smallest_of_families(records: Sequence[Record]) -> list[Record]:
    """One record of each family of models, that of the narrowest one: bytes over the width hardly depend on it."""
    found: dict[str, Record] = {}
    for record in _ordered(records):
        found.setdefault(record.config["model"]["family"], record)
    return list(found.values())


def _ordered(records: Sequence[Record]) -> list[Record]:
    """By family, and in one by width."""
    return sorted(records, key=lambda each: (each.config["model"]["family"], each.config["model"]["hidden_size"]))


def blocks(records: Sequence[Record]) -> Any:
    """What a block keeps for the backward pass, by origin: a bar a method, a panel a model, kind of heads and dropout.

    In bytes over (batch x length x width), as measured; the black line is the closed form's total.
    """
    panels = []
    for record in _ordered(records):
        wheres = list(dict.fromkeys(tuple(k.split("/")[1:3]) for k in record.summary if k.startswith("block/")))
        for heads in dict.fromkeys(heads for heads, _ in wheres):
            panels.append([(record, heads, dropout) for other, dropout in wheres if other == heads])
    if not panels:
        raise ValueError("no record of the ledger has bytes of a block: run python -m llmsys +exp=lorafa_ledger")
    figure, grid = _grid(len(panels), max(len(row) for row in panels), 6.0, 3.6)
    drawn: set[str] = set()
    for axes_row, row in zip(grid, panels, strict=True):
        for axes, (record, heads, dropout) in zip(axes_row, row, strict=False):
            drawn |= _bars(axes, record.summary, f"{heads}/{dropout}")
            axes.set_title(f"{record.config['model']['name']}, {heads.upper()}, dropout {dropout}", fontsize=10)
            axes.set_xlabel("saved by a block (bytes / (batch x length x width))")
        for axes in axes_row[len(row) :]:
            axes.set_visible(False)
    handles = [_patch(colour, origin) for origin, colour in zip(ORIGINS, COLOURS, strict=True) if origin in drawn]
    figure.legend(handles=[*handles, _line("closed form", color="black")], loc="outside upper center", ncols=8)
    return figure


def _bars(axes: Any, summary: Mapping[str, float], where: str) -> set[str]:
    """Fills one panel, the first method on top; returns the origins that it shows."""
    names = [name for name in COLUMNS if f"block/{where}/{name}/total" in summary]
    starts = [0.0] * len(names)
    drawn: set[str] = set()
    for origin, colour in zip(ORIGINS, COLOURS, strict=True):
        widths = [summary.get(f"block/{where}/{name}/{origin}", 0.0) for name in names]
        if any(widths):
            axes.barh(names, widths, left=starts, color=colour, height=0.75)
            starts = [start + width for start, width in zip(starts, widths, strict=True)]
            drawn.add(origin)
    for y, (name, total) in enumerate(zip(names, starts, strict=True)):
        formula = summary.get(f"block/{where}/{name}/total_closed")
        if formula is not None:
            axes.vlines(formula, y - 0.45, y + 0.45, color="black", linewidth=1.5)
        axes.text(total, y, f" {total:.1f}", va="center", fontsize=8)
    axes.invert_yaxis()
    axes.margins(x=0.12, y=0.02)
    axes.tick_params(labelsize=8)
    axes.spines[["top", "right"]].set_visible(False)
    return drawn


def whole(records: Sequence[Record], what: str) -> Any:
    """Predicted `what`, `saved` or `peak`, of whole models over the batch: a row a model, a panel a length; in GB."""
    panels: dict[str, dict[int, dict[str, list[tuple[int, float]]]]] = {}
    for record in _ordered(records):
        for key, nbytes in record.summary.items():
            if key.startswith("whole/") and key.endswith(f"/{what}_bytes"):
                cell, name = key.removeprefix("whole/").removesuffix(f"/{what}_bytes").split("/", 1)
                batch, length = (int(number) for number in cell.split("x"))
                lines = panels.setdefault(record.config["model"]["name"], {}).setdefault(length, {})
                lines.setdefault(name, []).append((batch, nbytes / GB))
    if not panels:
        raise ValueError(f"no record of the ledger predicts {what}_bytes: run python -m llmsys +exp=lorafa_ledger")
    figure, grid = _grid(len(panels), max(len(row) for row in panels.values()), 4.0, 3.2)
    drawn: set[str] = set()
    for axes_row, (model, row) in zip(grid, panels.items(), strict=True):
        for axes, (length, lines) in zip(axes_row, sorted(row.items()), strict=False):
            for name in (name for name in SHOWN if name in lines):
                axes.plot(*zip(*sorted(lines[name]), strict=True), marker="o", markersize=3, **_style(name))
                drawn.add(name)
            axes.set_title(f"{model}, length {length}", fontsize=10)
            axes.set_xlabel("batch (examples)")
            axes.set_ylabel({"saved": "saved tensors (GB)", "peak": "total peak (GB)"}[what])
            axes.set_ylim(bottom=0)
            axes.set_xticks(sorted({batch for points in lines.values() for batch, _ in points}))
            axes.grid(alpha=0.3)
        for axes in axes_row[len(row) :]:
            axes.set_visible(False)
    handles = [_line(name, **_style(name)) for name in SHOWN if name in drawn]
    figure.legend(handles=handles, loc="outside upper center", ncols=5)
    return figure


def _style(name: str) -> dict[str, Any]:
    """Peers dotted; ours in their policy's colour, with A trained broad and pale, so that A frozen shows on top."""
    if name in PEER_STYLES:
        return PEER_STYLES[name]
    method, policy = name.split("/")
    broad = {"linewidth": 6, "alpha": 0.3} if method == "lora" else {}
    return {"color": POLICY_COLOURS[policy], **broad}


def _grid(rows: int, columns: int, width: float, height: float) -> tuple[Any, Any]:
    """A figure and its panels, `[row][column]`. Not pyplot's: nothing else holds on to it."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width * columns, height * rows + 0.6), layout="constrained")
    return figure, figure.subplots(rows, columns, squeeze=False)


def _patch(colour: str, label: str) -> Any:
    from matplotlib.patches import Patch

    return Patch(color=colour, label=label)


def _line(label: str, **style: Any) -> Any:
    from matplotlib.lines import Line2D

    return Line2D([], [], label=label, **style)
