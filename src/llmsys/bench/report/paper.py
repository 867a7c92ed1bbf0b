"""The paper's tables (arXiv 2311.03687) out of our records, in its layout: techniques down, models and batches across.

grids      tokens/s and memory of every combination: its base table, and its table of LoRA and QLoRA
limits     the largest batch that runs, of combinations that several were tried of
scaling    tokens/s of a rank among several over those of one alone
phases     forward, backward and optimizer of a step
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from llmsys.bench.cells import Cell
from llmsys.bench.techniques import Techniques
from llmsys.bench.workloads import Workload
from llmsys.rows import over_repeats, row
from llmsys.sweep.scaling import efficiency

MOST = 8
"""Columns of a grid at most, of those that have half as many cells as the fullest one: a search tries more batches than
anybody wants to see beside each other."""
PHASES = ("data", "forward", "backward", "agreement", "communication", "offload", "optimizer")
BUSY = {"collectives": "communication_busy_ms", "copies": "offload_busy_ms"}
"""What engines do behind other work: how long it takes itself, within the phases. Name -> key of the summary."""


@dataclass(frozen=True, kw_only=True)
class Grid:
    """`columns`: (model, micro-batch); `rows`: a name, and its cell in each column, None where there is none. `left`:
    how many columns there was no room for."""

    title: str
    memory_name: str
    columns: tuple[tuple[str, int], ...]
    rows: tuple[tuple[str, tuple[Cell | None, ...]], ...]
    left: int


@dataclass(frozen=True, kw_only=True)
class Limit:
    """Of one combination: the largest micro-batch that ran, and the smallest above it that did not."""

    name: str
    world: int
    ran: Cell | None
    failed: Cell | None


def grids(workloads: Sequence[Workload]) -> list[Grid]:
    """One for each device, number of ranks, data and length; adapters apart from what trains every weight."""
    groups: dict[tuple[str, ...], dict[tuple[str, int], dict[str, Cell]]] = {}
    names: dict[tuple[str, ...], str] = {}
    order: dict[str, tuple[Any, ...]] = {}
    for workload in workloads:
        found = workload.settings
        model = str(found.get("model.name"))
        for cell in workload.cells:
            tuned = "fine-tuning" if cell.techniques and cell.techniques.adapter else "training"
            ranks = f"{cell.world} rank" + "s" * (cell.world != 1)
            work = (
                str(found.get("data.kind")),
                f"length {found.get('train.length')}",
                str(found.get("train.precision")),
            )
            place = (tuned, workload.device, ranks, *work)
            names[place] = workload.memory_name
            column = groups.setdefault(place, {}).setdefault((model, cell.batch), {})
            order[cell.label] = paper_order(cell.techniques)
            if cell.label not in column or (cell.ok and not column[cell.label].ok):
                column[cell.label] = cell
    return [_grid(place, names[place], columns, order) for place, columns in groups.items() if _worth(columns)]


def _worth(columns: dict[tuple[str, int], dict[str, Cell]]) -> bool:
    return sum(map(len, columns.values())) > 1


def _grid(
    place: tuple[str, ...],
    memory_name: str,
    columns: dict[tuple[str, int], dict[str, Cell]],
    order: dict[str, tuple[Any, ...]],
) -> Grid:
    fullest = Counter({column: len(cells) for column, cells in columns.items()}).most_common(MOST)
    shown = tuple(sorted(column for column, cells in fullest if 2 * cells >= fullest[0][1]))
    labels = sorted({label for column in shown for label in columns[column]}, key=lambda each: (order[each], each))
    tuned, device, ranks, data, length, precision = place
    return Grid(
        title=f"{tuned.capitalize()} on {device}, {ranks}, {length}, {precision}, {data} data",
        memory_name=memory_name,
        columns=shown,
        rows=tuple((label, tuple(columns[column].get(label) for column in shown)) for label in labels),
        left=len(columns) - len(shown),
    )


def paper_order(techniques: Techniques | None) -> tuple[Any, ...]:
    """Naive, Z2, Z2+O, Z3, Z3+O, each first alone and then with F, R and Q; adapters likewise, one after the other."""
    if techniques is None:
        return (2,)
    rest = [letter for letter in techniques.letters if letter not in ("O", "L", "LFA") and letter[0] not in "ZT"]
    return (
        0 if techniques.tensor == 1 else 1,
        techniques.adapter,
        techniques.zero,
        techniques.offload,
        len(rest),
        rest,
    )


def limits(workload: Workload) -> list[Limit]:
    """Of combinations of which several batches were tried."""
    groups: dict[tuple[str, int], list[Cell]] = {}
    for cell in workload.cells:
        groups.setdefault((cell.label, cell.world), []).append(cell)
    found = []
    for (name, world), cells in groups.items():
        if len({cell.batch for cell in cells}) < 2:
            continue
        failed = min((c for c in cells if c.record.status in ("oom", "skipped")), key=lambda c: c.batch, default=None)
        below = [cell for cell in cells if cell.ok and (failed is None or cell.batch < failed.batch)]
        ran = max(below, key=lambda cell: cell.batch, default=None)
        found.append(Limit(name=name, world=world, ran=ran, failed=failed))
    return sorted(found, key=lambda each: -(each.ran.batch if each.ran else 0))


def scaling(workload: Workload) -> list[tuple[dict[str, Any], float]]:
    """(row of a table, efficiency) of what ran on one rank and on several; none where no rank was alone."""
    records = [record for cell in workload.measured for record in cell.records]
    found = efficiency(over_repeats([row(record) for record in records]))
    if not any(each["config"]["train.world"] > 1 for each, _ in found):
        return []
    return sorted(found, key=lambda pair: (str(pair[0]["techniques"]), pair[0]["config"]["train.world"]))


def phases(cell: Cell) -> dict[str, float]:
    """ms of each phase of a step, in order; `other` is what is in none of them."""
    step = cell.of("step_ms_p50")
    found = {name: part.mean for name in PHASES if (part := cell.of(f"{name}_ms_p50"))}
    if step is None or not found:
        return {}
    return {**found, "other": max(0.0, step.mean - sum(found.values()))}
