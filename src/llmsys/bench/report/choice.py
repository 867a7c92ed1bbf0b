"""Which cell to take: the best by each goal, the runner-up, by how much, and what each of its letters is good for.

Only what was measured counts here; `llmsys.bench.advise` predicts what was not. A quantised base without an adapter
trains no linear weight, so where anything else was measured, such a cell is chosen for nothing.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from llmsys.bench.cells import Cell
from llmsys.bench.workloads import Workload
from llmsys.cost import hardware
from llmsys.spread import Spread, student

Value = Callable[[Cell], Spread | None]


@dataclass(frozen=True, kw_only=True)
class Goal:
    """What is wanted: `value` of a cell, the more the better if `most`."""

    name: str
    unit: str
    most: bool
    value: Value


@dataclass(frozen=True, kw_only=True)
class Ratio:
    """How two values compare, `percent` by which the first is above the second; `low` and `high` are the 95 % interval,
    None where a side was measured once."""

    percent: float
    low: float | None = None
    high: float | None = None

    @property
    def certain(self) -> bool:
        """Whether the interval leaves 0 out."""
        return self.low is not None and self.high is not None and (self.low > 0 or self.high < 0)


@dataclass(frozen=True, kw_only=True)
class Dropped:
    """What leaving one letter out of the choice does, where that was measured: in percent of the choice's."""

    letter: str
    other: Cell
    speed: Ratio | None
    memory: Ratio | None


@dataclass(frozen=True, kw_only=True)
class Choice:
    """The best cell by a goal. `margin`: by how much it is better than the runner-up, positive whatever the goal."""

    goal: Goal
    best: Cell
    second: Cell | None
    margin: Ratio | None
    dropped: tuple[Dropped, ...]


def goals(workload: Workload) -> list[Goal]:
    """Those that something was measured for."""
    found = [
        Goal(name="throughput", unit="tokens/s", most=True, value=lambda cell: cell.tokens),
        Goal(name="fit", unit="GiB", most=False, value=lambda cell: cell.memory),
        Goal(name="batch", unit="examples", most=True, value=_batch),
        Goal(name="cost", unit="US$/million tokens", most=False, value=usd_per_million),
        Goal(name="energy", unit="tokens/J", most=True, value=lambda cell: cell.of("tokens_per_j")),
    ]
    if len({cell.batch for cell in workload.measured}) < 2:
        found = [goal for goal in found if goal.name != "batch"]
    return [goal for goal in found if any(goal.value(cell) for cell in workload.measured)]


def choices(workload: Workload) -> list[Choice]:
    """The best cell by each goal of those with at least one cell; nothing of a single cell is a choice."""
    usable = [cell for cell in workload.measured if not cell.frozen] or workload.measured
    if len(usable) < 2:
        return []
    made = []
    for goal in goals(workload):
        ranked = ranking(usable, goal)
        if not ranked:
            continue
        best, second = ranked[0], next((each for each in ranked[1:] if each.label != ranked[0].label), None)
        margin = None
        if second is not None:
            margin = between(best, second, goal.value) if goal.most else between(second, best, goal.value)
        made.append(Choice(goal=goal, best=best, second=second, margin=margin, dropped=_dropped(best, workload)))
    return made


def ranking(cells: Sequence[Cell], goal: Goal) -> list[Cell]:
    """Best first; of equals the faster one, and of these the one with the smaller batch."""
    known = [(found.mean, cell) for cell in cells if (found := goal.value(cell))]
    sign = -1 if goal.most else 1
    order = sorted(known, key=lambda each: (sign * each[0], -(each[1].tokens.mean if each[1].tokens else 0.0)))
    return [cell for _, cell in order]


def compared(one: Spread | None, other: Spread | None, counts: tuple[int, int] | None = None) -> Ratio | None:
    """`one` over `other`. The interval is of the difference of logarithms, with the fewer repeats' degrees of freedom;
    there is none where `counts`, the repeats of each, is not given or one is 1."""
    if one is None or other is None or one.mean <= 0 or other.mean <= 0:
        return None
    log = math.log(one.mean / other.mean)
    if counts is None or min(counts) < 2 or not one.cv + other.cv:  # a size is no measurement
        return Ratio(percent=_percent(log))
    error = math.sqrt(one.cv**2 / counts[0] + other.cv**2 / counts[1])
    half = student(min(counts) - 1) * error
    return Ratio(percent=_percent(log), low=_percent(log - half), high=_percent(log + half))


def between(one: Cell, other: Cell, value: Value) -> Ratio | None:
    """`compared` for a number of two cells."""
    return compared(value(one), value(other), (len(one.records), len(other.records)))


def _percent(log: float) -> float:
    return 100 * math.expm1(log)


def _batch(cell: Cell) -> Spread | None:
    return Spread(float(cell.batch), 0.0, 0.0, 0.0)


def usd_per_million(cell: Cell) -> Spread | None:
    """US dollars for a million tokens at the example price of the card's rent (`cost.hardware.RENT`); None of a device
    that has none."""
    price = hardware.DEVICES[cell.card].usd_per_hour if cell.card else None
    if price is None or cell.tokens is None:
        return None
    usd = price * cell.world / 3600 / cell.tokens.mean * 1e6
    cv = cell.tokens.cv
    return Spread(usd, usd * cv, usd * cell.tokens.half / cell.tokens.mean, cv)


def _dropped(best: Cell, workload: Workload) -> tuple[Dropped, ...]:
    """Every letter of the choice whose absence was measured too, all else equal."""
    found = []
    for letter in best.techniques.letters if best.techniques else ():
        other = sibling(best, letter, workload.measured)
        if other:
            speed = between(other, best, lambda cell: cell.tokens)
            memory = between(other, best, lambda cell: cell.memory)
            found.append(Dropped(letter=letter, other=other, speed=speed, memory=memory))
    return tuple(found)


def sibling(cell: Cell, letter: str, cells: Sequence[Cell]) -> Cell | None:
    """The cell that is `cell` without `letter` and the same in batch, ranks and what stands beside their names; None
    where there is none, or where the letter cannot go alone: a Z that has an O."""
    if cell.techniques is None:
        return None
    try:
        wanted = cell.techniques.without(letter)
    except ValueError:  # what would be left contradicts itself
        return None
    if len(wanted.letters) != len(cell.techniques.letters) - 1:
        return None
    keys = ("train.global_batch", "train.seed", "method.r" if "L" not in letter else "")
    alike = [
        each
        for each in cells
        if (each.world, each.batch) == (cell.world, cell.batch)
        and each.techniques == wanted
        and all(each.settings.get(key) == cell.settings.get(key) for key in keys)
        and _marks(each, letter) == _marks(cell, letter)
    ]
    return min(alike, key=lambda each: each.beside != cell.beside, default=None)


def _marks(cell: Cell, letter: str) -> dict[str, str]:
    """What stands beside the other letters."""
    kind = "L" if letter in ("L", "LFA") else letter[0]
    return {of: mark for of, mark in cell.marks if of != kind}
