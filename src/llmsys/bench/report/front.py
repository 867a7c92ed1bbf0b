"""The Pareto front: cells that no other one beats in speed and memory at once."""

from __future__ import annotations

from collections.abc import Sequence

from llmsys.bench.cells import Cell


def drawable(cells: Sequence[Cell]) -> list[Cell]:
    """Cells that have both numbers."""
    return [cell for cell in cells if cell.tokens and cell.memory]


def front(cells: Sequence[Cell]) -> list[Cell]:
    """Least memory first. A cell that needs as much as another and is not faster is not on it; nor is one that trains
    no linear weight, as long as another does."""
    usable = drawable([cell for cell in cells if not cell.frozen]) or drawable(cells)
    found: list[Cell] = []
    for cell in sorted(usable, key=_place):
        if not found or _speed(cell) > _speed(found[-1]):
            found.append(cell)
    return found


def _place(cell: Cell) -> tuple[float, float]:
    assert cell.memory is not None
    return cell.memory.mean, -_speed(cell)


def _speed(cell: Cell) -> float:
    assert cell.tokens is not None
    return cell.tokens.mean
