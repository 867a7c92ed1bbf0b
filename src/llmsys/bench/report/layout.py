"""The paper's tables as HTML: grids of techniques by models and batches, limits, scaling."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from llmsys.bench.cells import GIB, Cell
from llmsys.bench.report import paper
from llmsys.bench.report.html import Markup, count, join, measured, number, paragraph, table, tag
from llmsys.bench.workloads import Workload


def tables(workloads: Sequence[Workload]) -> Markup:
    """The paper's grids, limits and scaling."""
    parts = [_grid(grid) for grid in paper.grids(workloads)]
    for workload in workloads:
        if limits := paper.limits(workload):
            parts += [tag("h3", f"Largest micro-batch: {workload.title}"), _limits(limits, workload)]
        if scaled := paper.scaling(workload):
            parts += [tag("h3", f"Scaling efficiency: {workload.title}"), _scaling(scaled)]
    if not parts:
        return paragraph(
            "No two cells to put beside each other: python -m llmsys sweep=bench_pretrain_grid", class_="none"
        )
    return join(parts)


def _grid(grid: paper.Grid) -> Markup:
    names = [tag("th", f"{model}, bs {batch}", colspan=2, class_="group") for model, batch in grid.columns]
    below = [join([tag("th", "tokens/s"), tag("th", "GiB")]) for _ in grid.columns]
    head = join([tag("tr", tag("th", ""), *names), tag("tr", tag("th", "techniques", class_="w"), *below)])
    rows = [[label, *(part for cell in cells for part in _both(cell))] for label, cells in grid.rows]
    frozen = any(cell and cell.frozen for _, cells in grid.rows for cell in cells)
    notes = [f"bs: examples of a rank in one pass; GiB: {grid.memory_name} of a rank."]
    notes += ["† trains no linear weight: the base is quantised and frozen, without an adapter."] if frozen else []
    notes += [f"{count(grid.left, 'column')} more: below, under the largest micro-batch."] if grid.left else []
    return join([tag("h3", grid.title), table([head], rows), paragraph(" ".join(notes), class_="note")])


def _both(cell: Cell | None) -> tuple[object, ...]:
    if cell is None:
        return "", ""
    if not cell.ok:
        word = {"oom": "OOM", "skipped": "not run"}.get(cell.record.status, cell.record.status)
        return (tag("td", tag("span", word, class_="failed", title=cell.ending), colspan=2),)
    mark = " †" if cell.frozen else ""
    loud = tag("span", " !", class_="bad", title="varies more over repeats than it should") if cell.noisy else ""
    repeats = len(cell.records)
    return join([measured(cell.tokens, repeats), mark, loud]), measured(cell.memory, repeats, 1 / GIB)


def _limits(limits: Sequence[paper.Limit], workload: Workload) -> Markup:
    rows = [
        (
            one.name,
            one.world,
            one.ran.batch if one.ran else "none",
            measured(one.ran.tokens, len(one.ran.records)) if one.ran else "–",
            measured(one.ran.memory, len(one.ran.records), 1 / GIB) if one.ran else "–",
            one.failed.batch if one.failed else "none tried",
            one.failed.ending if one.failed else "–",
        )
        for one in limits
    ]
    heads = ["techniques", "ranks", "largest that ran", "tokens/s", f"{workload.memory_name}, GiB"]
    return table([*heads, "smallest that did not", "why"], rows)


def _scaling(scaled: Sequence[tuple[dict[str, Any], float]]) -> Markup:
    rows = [
        (
            f"{row['techniques'] or row['engine']}",
            row["config"]["train.world"],
            number(row["tokens_per_s"]),
            f"{100 * share:.1f} %",
        )
        for row, share in scaled
    ]
    return table(["techniques", "ranks", "tokens/s", "efficiency"], rows)
