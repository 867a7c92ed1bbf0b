"""What a letter costs or gains, in each context: cells in pairs that differ in that letter and in nothing else.

A mean over all cells with a letter and one over all without would compare different sets: cells with F that did not fit
are missing from one side alone. So only pairs count. Their ratios are averaged as logarithms, so that a letter which
doubles in one context and halves in another comes to nothing; the 95 % interval is Student's over the pairs. It says
how far the effect varies between contexts, which is not what repeats of one cell vary by.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from llmsys.bench.cells import Cell
from llmsys.bench.report.choice import Ratio, Value, between, sibling
from llmsys.bench.techniques import LETTERS
from llmsys.bench.workloads import Workload
from llmsys.spread import spread

ORDER = ("F", "R", "Z1", "Z2", "Z3", "O", "Q", "L", "LFA", "O8", "Q8")
assert set(ORDER) <= set(LETTERS)


@dataclass(frozen=True, kw_only=True)
class Pair:
    """Two cells; `ratio`: of the one with the letter over the one without."""

    on: Cell
    off: Cell
    ratio: Ratio

    @property
    def context(self) -> str:
        """What both have, and what the letter was done by where that is not what it stands for."""
        (missing,) = set(self.on.marks) - set(self.off.marks) or {("", "")}
        return self.off.label + (f" (by {missing[1]})" if missing[1] else "")


@dataclass(frozen=True, kw_only=True)
class Effect:
    """Of one letter on one number; `mean` over all `pairs`, with its interval from two pairs on."""

    letter: str
    mean: Ratio
    pairs: tuple[Pair, ...]


def effects(workload: Workload, value: Value) -> list[Effect]:
    """Of every letter of which there is a pair, in the order of the notation."""
    measured = workload.measured
    letters = {letter for cell in measured if cell.techniques for letter in cell.techniques.letters}
    found = []
    for letter in sorted(letters, key=_place):
        pairs = tuple(_pairs(measured, letter, value))
        if pairs:
            found.append(Effect(letter=letter, mean=_mean([pair.ratio for pair in pairs]), pairs=pairs))
    return found


def _pairs(cells: Sequence[Cell], letter: str, value: Value) -> list[Pair]:
    found = []
    for cell in cells:
        if cell.techniques is None or letter not in cell.techniques.letters:
            continue
        other = sibling(cell, letter, cells)
        ratio = between(cell, other, value) if other else None
        if other and ratio:
            found.append(Pair(on=cell, off=other, ratio=ratio))
    return found


def _mean(ratios: Sequence[Ratio]) -> Ratio:
    found = spread([math.log1p(each.percent / 100) for each in ratios])
    percent = 100 * math.expm1(found.mean)
    if len(ratios) < 2:
        return Ratio(percent=percent)
    ends = (100 * math.expm1(found.mean + sign * found.half) for sign in (-1, 1))
    return Ratio(percent=percent, low=next(ends), high=next(ends))


def _place(letter: str) -> tuple[int, str]:
    return (ORDER.index(letter) if letter in ORDER else len(ORDER), letter)
