"""What the parts of the page share: how a change, a cell's size and its family are written."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from llmsys.bench.cells import Cell
from llmsys.bench.report.choice import Ratio
from llmsys.bench.report.html import Markup, count, interval, join, paragraph, signed, tag
from llmsys.bench.workloads import Workload

Draw = Callable[[Workload], Markup]


def each(workloads: Sequence[Workload], draw: Draw, nothing: str) -> Markup:
    """What `draw` makes of each workload, under its title; where it makes nothing of any, `nothing`."""
    drawn = [(workload, draw(workload)) for workload in workloads]
    shown = [(workload, part) for workload, part in drawn if part]
    if not shown:
        return paragraph(nothing, class_="none")
    return join(join([tag("h3", workload.title), part]) for workload, part in shown)


def change(ratio: Ratio | None, more_is_good: bool) -> Markup:
    """A change in percent, in the colour of what it means."""
    if ratio is None:
        return tag("td", "–")
    good = (ratio.percent > 0) == more_is_good
    style = "" if abs(ratio.percent) < 1 else ("good" if good else "bad")
    ends = interval(ratio.low, ratio.high)
    return tag("td", signed(ratio.percent), class_=style or None, title=f"95 %: {ends}" if ends else None)


def size(cell: Cell) -> str:
    """Ranks and batch of a cell."""
    whole = cell.settings.get("train.global_batch")
    ranks = count(cell.world, "rank")
    return f"{ranks}, micro-batch {cell.batch}" + (
        f" of {whole}" if whole not in (None, cell.batch * cell.world) else ""
    )


FAMILIES = ("no ZeRO", "Z1", "Z2", "Z2+O", "Z3", "Z3+O", "other")


def family(cell: Cell) -> tuple[str, int]:
    """The series of a cell in a chart and its colour, the same on the whole page."""
    found = cell.techniques
    name = "other"
    if found and found.tensor == 1:
        name = f"Z{found.zero}" + "+O" * found.offload if found.zero else "no ZeRO"
    colour = FAMILIES.index(name) if name in FAMILIES else FAMILIES.index("Z1")  # Z1+O
    return (f"TP{found.tensor}" if found and found.tensor > 1 else name), colour
