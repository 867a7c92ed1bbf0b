"""The parts of the page that are drawn: the Pareto front, letters, phases, and predictions beside measurements.

Each takes a workload and returns HTML, "" where there is nothing to draw.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence

from llmsys.bench.cells import GIB, Workload
from llmsys.bench.report import ablation, front, paper, quality, svg
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

BARS = 16
"""In a chart of phases; the table has all."""


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
    """A step by its phases: bars of the fastest cells, and a table of all."""
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
    body = [
        [cell.label, size(cell), *(_phase(parts, name) for name in names), number(sum(parts.values()))]
        for cell, parts in sorted(found, key=lambda each: paper.paper_order(each[0].techniques))
    ]
    hidden = {
        cell.label: cell.record.notes["communication_ms"]
        for cell, _ in found
        if "communication_ms" in cell.record.notes
    }
    notes = [tag("li", tag("b", label), f": {text}") for label, text in hidden.items()]
    some = f"Cells of {usual}" + (f", the {BARS} fastest of {len(alike)}. " if len(alike) > BARS else ". ")
    some = some if len(rows) < len(found) else ""
    return join(
        [
            svg.bars(rows, "ms"),
            paragraph(f"{some}Medians over steps; other: what of a step is in no phase.", class_="note"),
            details("All cells, ms and % of the step", table(["", "", *names, "step"], body, left=2)),
            details("Where communication is hidden", tag("ul", *notes)) if notes else "",
        ]
    )


def _phase(parts: dict[str, float], name: str) -> str:
    if name not in parts:
        return ""
    return f"{number(parts[name])} ({100 * parts[name] / sum(parts.values()):.0f} %)"


def predicted(workload: Workload) -> Markup:
    """Predicted against measured, memory and time."""
    parts = []
    memory, time = quality.memory_guesses(workload), quality.time_guesses(workload)
    for guesses, unit, scale, name, other in (
        (memory, "GiB", 1 / GIB, f"{workload.memory_name} of a rank", "peak memory of a rank"),
        (time, "ms", 1.0, "time of a step", "time of a step"),
    ):
        found = quality.score(guesses)
        if found is None:
            continue
        points = [
            svg.Point(
                x=one.measured * scale,
                y=one.predicted * scale,
                series=family(one.cell)[0],
                colour=family(one.cell)[1],
                title=f"{one.cell.label}, {size(one.cell)}: predicted {number(one.predicted * scale)}, "
                f"measured {number(one.measured * scale)} {unit} ({signed(one.error)})",
            )
            for one in guesses
        ]
        ends = [value for point in points for value in (point.x, point.y)]
        x, y = svg.log_axis(f"measured {name}, {unit}", ends), svg.log_axis(f"predicted {other}, {unit}", ends)
        order = "" if found.tau is None else f", Kendall's tau {found.tau:.2f}"
        parts += [
            tag("h4", name.capitalize()),
            svg.scatter(points, x, y, diagonal=True),
            paragraph(
                f"Mean error {found.error:.1f} %, bias {signed(found.bias)}{order}; "
                f"{found.count} of {count(len(workload.measured), 'cell')} have a prediction."
            ),
        ]
    if parts and workload.kind == "cpu":
        text = "Accounted memory is what is held and saved, the prediction that of the fullest moment, with workspace."
        parts.append(paragraph(text, class_="note"))
    return join(parts)
