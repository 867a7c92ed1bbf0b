"""The part of the page that holds predictions against measurements: memory and time, a point for each cell."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from llmsys.bench.cells import GIB, Cell
from llmsys.bench.report import predictions, quality, svg
from llmsys.bench.report.common import family, size
from llmsys.bench.report.html import Markup, count, details, join, number, paragraph, signed, table, tag
from llmsys.bench.report.predictions import Guess, Guesses
from llmsys.bench.workloads import Workload
from llmsys.job import Record

LEAST = "lower bound ms: arithmetic and links at their peaks"
"""What records of training call `predicted_step_ms`: a lower bound, said before the run."""


def predicted(workload: Workload, records: Sequence[Record]) -> Markup:
    """Both charts, who has no prediction and why, and all cells; "" where nothing was measured."""
    if not workload.measured:
        return Markup("")
    found = predictions.of(workload, records)
    parts = [
        _chart(found.memory, f"{workload.memory_name} of a rank", "GiB", 1 / GIB, found.without_memory),
        _chart(found.time, "time of a step", "ms", 1.0, found.without_time),
    ]
    if workload.kind == "cpu" and found.memory:
        text = "Accounted memory: what is held and saved, of the same kinds on both sides; no moment of a step."
        parts.append(paragraph(text, class_="note"))
    parts += [paragraph(f"Time by {source}.", class_="note") for source in found.sources]
    return join([*parts, details("All cells", _table(workload, found))])


def _chart(guesses: Sequence[Guess], name: str, unit: str, scale: float, without: Mapping[str, list[Cell]]) -> Markup:
    score = quality.score(guesses)
    parts = [tag("h4", name.capitalize())]
    if score:
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
        x, y = (svg.log_axis(f"{which} {name}, {unit}", ends) for which in ("measured", "predicted"))
        order = "" if score.tau is None else f", Kendall's tau {score.tau:.2f}"
        every = len(guesses) + sum(map(len, without.values()))
        said = f"Mean error {score.error:.1f} %, bias {signed(score.bias)}{order}; "
        parts += [svg.scatter(points, x, y, diagonal=True)]
        parts += [paragraph(said, f"{score.count} of {count(every, 'cell')} have a prediction.")]
    parts += [paragraph(f"{count(len(cells), 'cell')} without: {why}", class_="none") for why, cells in without.items()]
    return join(parts)


def _table(workload: Workload, found: Guesses) -> Markup:
    memory, time = ({id(one.cell): one for one in guesses} for guesses in (found.memory, found.time))
    rows = []
    for cell in workload.measured:
        least = cell.of("predicted_step_ms")
        both = [*_both(memory.get(id(cell)), 1 / GIB), *_both(time.get(id(cell)), 1.0)]
        rows.append([cell.label, size(cell), *both, "–" if least is None else number(least.mean)])
    heads = ["", "", "predicted GiB", "measured", "error", "predicted ms", "measured", "error", LEAST]
    return table(heads, rows, left=2)


def _both(one: Guess | None, scale: float) -> tuple[str, str, str]:
    if one is None:
        return "–", "–", "–"
    return number(one.predicted * scale), number(one.measured * scale), signed(one.error)
