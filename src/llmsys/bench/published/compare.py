"""Rows of a published table and cells of ours: which belong together, and how far apart their numbers are."""

from __future__ import annotations

import functools
import statistics
from collections.abc import Collection, Sequence
from dataclasses import dataclass

from llmsys import compose
from llmsys.bench import cells, workloads
from llmsys.bench.cells import Cell
from llmsys.bench.published.quantities import EFFICIENCY, LARGEST
from llmsys.bench.published.table import Machine, Row, Table
from llmsys.job import Record
from llmsys.rows import row as as_row
from llmsys.sweep.scaling import efficiency

SETTINGS = {"model": "model.name", "batch": "train.micro_batch", "length": "train.length", "r": "method.r"}
"""Key -> the setting it is."""


@dataclass(frozen=True, kw_only=True)
class Line:
    """One number of a row beside one cell of ours, in our units. `published`: None where it is not filled in. `ours`:
    None where the cell has no such number; `cell` says how it ended."""

    row: Row
    quantity: str
    unit: str
    scale: float
    share: bool
    published: float | None
    ours: float | None
    cell: Cell

    @property
    def delta(self) -> float | None:
        """Ours above the published one: percent of that, or points of a share. None unless both are numbers."""
        if self.published is None or self.ours is None or self.published in (0.0, float("inf")):
            return None
        return self.ours - self.published if self.share else 100 * (self.ours / self.published - 1)


@dataclass(frozen=True, kw_only=True)
class Comparison:
    """`missing`: rows of the table that we have nothing of. `spare`: cells of ours that are in no row. `without`: where
    no row matches, how many would if one key were not compared."""

    lines: tuple[Line, ...]
    missing: tuple[Row, ...]
    spare: tuple[Cell, ...]
    without: dict[str, int]


def compare(table: Table, records: Sequence[Record], ignore: Collection[str] = ()) -> Comparison:
    """Every number of every row beside every cell of ours that it is about. `ignore`: keys that are not compared."""
    ours = candidates(table, records)
    shares = _efficiencies(records) if any(column.name == EFFICIENCY for column in table.columns) else {}
    lines: list[Line] = []
    missing, used = [], set()
    for row in table.rows:
        found = chosen(table, [cell for cell in ours if matches(row, cell, ignore)])
        if not found:
            missing.append(row)
        for cell in found:
            used.add(id(cell))
            lines += _lines(table, row, cell, shares)
    spare = [cell for cell in ours if id(cell) not in used]
    if table.has(LARGEST):  # the batches below the largest one are no cells of their own
        spare = [cell for cell in spare if not any(matches(row, cell, ignore) for row in table.rows)]
    without: dict[str, int] = {}
    if not lines:
        for key in table.keys:
            rest = (*ignore, key)
            count = sum(any(matches(row, cell, rest) for cell in ours) for row in table.rows)
            without |= {key: count} if count else {}
    return Comparison(lines=tuple(lines), missing=tuple(missing), spare=tuple(spare), without=without)


def candidates(table: Table, records: Sequence[Record]) -> list[Cell]:
    """Our cells that a row of the table could be about."""
    if table.of_modules:
        timed = [record for record in records if record.task == "bench_modules" and record.status == "ok"]
        return [cells.alone(record) for record in timed]
    return [cell for workload in workloads.workloads(records) for cell in workload.cells]


def matches(row: Row, cell: Cell, ignore: Collection[str] = ()) -> bool:
    """Whether a cell is what a row is about: all keys that the row has, but those that are ignored."""
    return all(_same(key, wanted, row, cell) for key, wanted in row.keys.items() if key not in ignore)


def _same(key: str, wanted: str, row: Row, cell: Cell) -> bool:
    if key == "module":
        return True
    if key == "techniques":
        return str(cell.techniques) == wanted
    if key == "world":
        return cell.world == int(wanted)
    if key == "hardware":
        machine = Machine.parse(wanted)
        ranks = machine.devices if "world" not in row.keys else cell.world
        linked = cell.settings.get("hardware.nvlink", True)
        return (cell.card, linked, cell.world) == (machine.card, machine.nvlink, ranks)
    whole = key != "model" or cell.settings.get("model.num_layers") in (None, layers(wanted))
    return whole and str(cell.settings.get(SETTINGS[key])) == wanted


@functools.cache
def layers(model: str) -> int | None:
    """Of a model as it is published: one that was cut is another one. None of a model that has none."""
    import yaml

    found: int | None = yaml.safe_load((compose.CONF / "model" / f"{model}.yaml").read_text()).get("num_layers")
    return found


def chosen(table: Table, found: Sequence[Cell]) -> list[Cell]:
    """Of matching cells those that count: where any ended well the others do not; of a table of the largest batch, that
    one of each label."""
    good = [cell for cell in found if cell.ok]
    if not table.has(LARGEST):
        return good or list(found)
    largest: dict[tuple[str, int], Cell] = {}
    for cell in sorted(good, key=lambda each: each.batch):
        largest[cell.label, cell.world] = cell
    return list(largest.values())


def _lines(table: Table, row: Row, cell: Cell, shares: dict[str, float]) -> list[Line]:
    made = []
    for column in table.columns:
        quantity = table.quantity(column, row)
        ours = quantity.value(cell) if cell.ok else None
        if column.name == EFFICIENCY:
            own = [100 * shares[record.run_id] for record in cell.records if record.run_id in shares]
            ours = statistics.fmean(own) if own else None
        made.append(
            Line(
                row=row,
                quantity=column.name,
                unit=column.unit,
                scale=quantity.units[column.unit],
                share=quantity.share,
                published=row.numbers.get(column.header),
                ours=ours,
                cell=cell,
            )
        )
    return made


def _efficiencies(records: Sequence[Record]) -> dict[str, float]:
    """Run id -> tokens/s of a rank over those of a rank alone."""
    found = efficiency([as_row(record) for record in records if cells.trains(record)])
    return {row["run_id"]: share for row, share in found if row["config"]["train.world"] > 1}
