"""What whole steps take of the sum of their operators: two factors for each pass, from one or two cells.

    measured = a work + b start

A small cell is mostly the starting of operators, a large one mostly their work, so two cells tell the factors apart. On
a device that works behind its host a pass is the longer one of both, and each factor is that of the cells where its
side is the longer one. Factors out of `SANE` are noise, or two cells that are too alike: then both are one, the ratio
of all that was measured to all that was predicted. That of starts may be large on a CPU (`STARTS`): measured is torch's
own start of an operator, and a model's operators are called through modules in Python.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

SANE, STARTS = (0.2, 5.0), (0.2, 50.0)


class Factors(NamedTuple):
    """a and b; `why`: what was wrong with the two of a fit, where they are one."""

    work: float
    start: float
    why: str = ""


class Seen(NamedTuple):
    """A pass of one cell: predicted seconds of work and of starting operators, and seconds measured."""

    work: float
    start: float
    measured: float


def factors(cells: Sequence[Seen], *, behind: bool) -> Factors:
    """Of at least one cell. ValueError without cells, or with one that took no time."""
    if not cells or min(cell.measured for cell in cells) <= 0:
        raise ValueError(f"{len(cells)} cells: factors need at least one, each of some time")
    found = _behind(cells) if behind else _both(cells)
    bounds = (SANE, SANE if behind else STARTS)
    if found and all(low <= value <= high for value, (low, high) in zip(found, bounds, strict=True)):
        longer = {cell.work >= cell.start for cell in cells} if behind else {True, False}
        why = "" if len(longer) == 2 else "in all cells the same side is the longer one; its factor for both"
        return Factors(*found, why)
    total = sum(max(cell.work, cell.start) if behind else cell.work + cell.start for cell in cells)
    same = sum(cell.measured for cell in cells) / total
    if found is None:
        why = "the cells are too alike to tell work and starts apart"
    else:
        said = zip(found, ("work", "starts"), bounds, strict=True)
        each = ", ".join(f"{value:.3g} for {what} ({low:g} to {high:g})" for value, what, (low, high) in said)
        why = f"out of bounds: {each}"
    return Factors(same, same, f"{why}; {same:.3g} for both")


def _behind(cells: Sequence[Seen]) -> tuple[float, float]:
    sides = ([cell for cell in cells if cell.work >= cell.start], [cell for cell in cells if cell.work < cell.start])
    work, start = (
        sum(cell.measured for cell in side) / sum(max(cell.work, cell.start) for cell in side) if side else None
        for side in sides
    )
    return work or start or 1.0, start or work or 1.0


def _both(cells: Sequence[Seen]) -> tuple[float, float] | None:
    """Least squares of the relative error; None where cells are proportional to each other."""
    ww = sum((cell.work / cell.measured) ** 2 for cell in cells)
    ss = sum((cell.start / cell.measured) ** 2 for cell in cells)
    ws = sum(cell.work * cell.start / cell.measured**2 for cell in cells)
    w, s = (sum(side / cell.measured for side, cell in pairs) for pairs in _sides(cells))
    determinant = ww * ss - ws * ws
    if determinant <= 1e-6 * ww * ss:
        return None
    return (w * ss - s * ws) / determinant, (s * ww - w * ws) / determinant


def _sides(cells: Sequence[Seen]) -> tuple[list[tuple[float, Seen]], list[tuple[float, Seen]]]:
    return [(cell.work, cell) for cell in cells], [(cell.start, cell) for cell in cells]
