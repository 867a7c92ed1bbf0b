"""The parts of the page that are drawn: the Pareto front, letters, and phases.

Each takes a workload and returns HTML, "" where there is nothing to draw.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence

from llmsys.bench.cells import GIB, Cell
from llmsys.bench.report import ablation, front, paper, svg
from llmsys.bench.report.choice import Ratio
from llmsys.bench.report.common import change, family, size
from llmsys.bench.report.html import (
    Markup,
    count,
    details,
    interval,
    join,
    measured,
    number,
    paragraph,
    signed,
    table,
    tag,
)
from llmsys.bench.workloads import Workload

BARS = 16
"""In a chart of phases; the table has all."""
HIDDEN = ("communication_ms", "offload_ms")
"""Notes that say which phases they are a part of."""


def pareto(workload: Workload) -> Markup:
    """Tokens/s over memory, and the cells that no other beats."""
    cells = front.drawable(workload.measured)
    if len(cells) < 2:
        return Markup("")
    best = front.front(cells)
    points = [
        svg.Point(
            x=cell.memory.mean / GIB,
            y=cell.tokens.mean,
            series=family(cell)[0],
            colour=family(cell)[1],
            title=f"{cell.label}, {size(cell)}: {number(cell.tokens.mean)} tokens/s, "
            f"{number(cell.memory.mean / GIB)} GiB",
            label=cell.label if cell in best else "",
            hollow=cell.frozen and cell not in best,
        )
        for cell in sorted(cells, key=lambda each: paper.paper_order(each.techniques))
        if cell.memory and cell.tokens
    ]
    x = svg.axis(f"{workload.memory_name} of a rank, GiB", [p.x for p in points])
    y = svg.axis("tokens/s, all ranks", [p.y for p in points], zero=True)
    line = [(cell.memory.mean / GIB, cell.tokens.mean) for cell in best if cell.memory and cell.tokens]
    rows = [
        (
            cell.label,
            cell.world,
            cell.batch,
            measured(cell.memory, len(cell.records), 1 / GIB),
            measured(cell.tokens, len(cell.records)),
        )
        for cell in best
    ]
    left = len(workload.measured) - len(cells)
    without = f" {count(left, 'cell')} without a number for memory (profile.probe=false) not drawn." if left else ""
    frozen = " Hollow: trains no linear weight." if any(point.hollow for point in points) else ""
    return join(
        [
            svg.scatter(points, x, y, line=line),
            paragraph(f"The line is the most that each amount of memory buys.{frozen}{without}", class_="note"),
            details(
                f"The {count(len(best), 'cell')} on the front",
                table(["", "ranks", "micro-batch", "GiB of a rank", "tokens/s"], rows),
            ),
        ]
    )


def letters(workload: Workload) -> Markup:
    """What each letter does to speed and memory: means over pairs, and every pair in its context."""
    speed = ablation.effects(workload, lambda cell: cell.tokens)
    memory = ablation.effects(workload, lambda cell: cell.memory)
    if not speed and not memory:
        return Markup("")
    charts = [
        svg.effects([_row(effect) for effect in effects], name)
        for effects, name in ((speed, "tokens/s, %"), (memory, "memory of a rank, %"))
        if effects
    ]
    tables = [
        join([tag("h4", name), _lattice(effects, more_is_good)])
        for effects, name, more_is_good in ((speed, "tokens/s", True), (memory, "memory of a rank", False))
        if effects
    ]
    return join(
        [
            tag("div", *charts, class_="pair-of-charts"),
            paragraph(
                "Small points are pairs of cells that differ in this letter alone; the diamond is the mean of their "
                "ratios, the line its 95 % interval over pairs. A letter with one pair has no interval.",
                " Q without an adapter also freezes what it quantises." if any(e.letter == "Q" for e in speed) else "",
                class_="note",
            ),
            details("Each letter in each context", *tables),
        ]
    )


def _row(effect: ablation.Effect) -> tuple[str, float, float | None, float | None, list[tuple[float, str]]]:
    mean = effect.mean
    pairs = [(p.ratio.percent, f"{effect.letter} on {p.context}: {signed(p.ratio.percent)}") for p in effect.pairs]
    return effect.letter, mean.percent, mean.low, mean.high, pairs


def _lattice(effects: Sequence[ablation.Effect], more_is_good: bool) -> Markup:
    """Contexts down, letters across; the last line has the means."""
    contexts: dict[tuple[str, str], dict[str, Ratio]] = {}
    for effect in effects:
        for pair in effect.pairs:
            contexts.setdefault((pair.context, size(pair.off)), {})[effect.letter] = pair.ratio
    names = [effect.letter for effect in effects]
    several = len({where for _, where in contexts}) > 1
    rows: list[list[object]] = [
        [f"{context}, {where}" if several else context, *(_cell(own.get(name), more_is_good) for name in names)]
        for (context, where), own in contexts.items()
    ]
    means: list[object] = [tag("td", tag("b", "mean"), class_="w")]
    means += [change(effect.mean, more_is_good) for effect in effects]
    spans: list[object] = [tag("td", "95 % interval", class_="w")]
    spans += [interval(effect.mean.low, effect.mean.high) or "–" for effect in effects]
    pairs: list[object] = [tag("td", "pairs", class_="w"), *(len(effect.pairs) for effect in effects)]
    return table(["with … on", *names], [*rows, means, spans, pairs])


def _cell(ratio: Ratio | None, more_is_good: bool) -> object:
    return "" if ratio is None else change(ratio, more_is_good)


def phases(workload: Workload) -> Markup:
    """A step by its phases: bars of the fastest cells, and a table of all, with how long collectives and copies took
    themselves, which is within the phases and no part of their sum."""
    found = [(cell, parts) for cell in workload.measured if (parts := paper.phases(cell))]
    if not found:
        return Markup("")
    found.sort(key=lambda each: -(each[0].tokens.mean if each[0].tokens else 0.0))
    names = [name for name in (*paper.PHASES, "other") if any(name in parts for _, parts in found)]
    usual = Counter(size(cell) for cell, _ in found).most_common(1)[0][0]
    alike = [(cell, parts) for cell, parts in found if size(cell) == usual]
    rows = [
        svg.Bar(
            name=cell.label,
            parts={name: parts.get(name, 0.0) for name in names},
            end=f"{number(sum(parts.values()))} ms",
        )
        for cell, parts in alike[:BARS]
    ]
    busy = [name for name in paper.BUSY if any(cell.of(paper.BUSY[name]) for cell, _ in found)]
    body = [
        [
            *(cell.label, size(cell)),
            *(_phase(parts, name) for name in names),
            number(sum(parts.values())),
            *(_busy(cell, parts, name) for name in busy),
        ]
        for cell, parts in sorted(found, key=lambda each: paper.paper_order(each[0].techniques))
    ]
    heads = ["", "", *names, "step", *(f"{name}, overlapped" for name in busy)]
    hidden = {
        cell.label: "; ".join(cell.record.notes[key] for key in HIDDEN if key in cell.record.notes)
        for cell, _ in found
        if any(key in cell.record.notes for key in HIDDEN)
    }
    notes = [tag("li", tag("b", label), f": {text}") for label, text in hidden.items()]
    extra = "Overlapped: how long collectives and copies took themselves, within the phases, in one step more. "
    some = f"Cells of {usual}" + (f", the {BARS} fastest of {len(alike)}. " if len(alike) > BARS else ". ")
    some = some if len(rows) < len(found) else ""
    return join(
        [
            svg.bars(rows, "ms"),
            paragraph(f"{some}Medians over steps; other: what of a step is in no phase.", class_="note"),
            details("All cells, ms and % of the step", table(heads, body, left=2)),
            paragraph(extra, "Ranks that wait for each other are in it.", class_="note") if busy else "",
            details("Where communication and copies are hidden", tag("ul", *notes)) if notes else "",
        ]
    )


def _busy(cell: Cell, parts: dict[str, float], name: str) -> str:
    found = cell.of(paper.BUSY[name])
    return "" if found is None else f"{number(found.mean)} ({100 * found.mean / sum(parts.values()):.0f} %)"


def _phase(parts: dict[str, float], name: str) -> str:
    if name not in parts:
        return ""
    return f"{number(parts[name])} ({100 * parts[name] / sum(parts.values()):.0f} %)"
