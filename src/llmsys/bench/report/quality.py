"""How far the numbers of a report can be trusted: the errors of predictions, what clocks cost, what is noisy."""

from __future__ import annotations

import itertools
import math
import statistics
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from llmsys.bench.cells import Cell, limit
from llmsys.bench.report.predictions import Guess
from llmsys.bench.workloads import Workload
from llmsys.drift import Drift, drift, seconds
from llmsys.job import Record

TIMERS, SPANS, ATTRIBUTED = 1.0, 5.0, 95.0
"""Percent: clocks of phases and those of modules may cost so much of a step; modules must account for so much."""


@dataclass(frozen=True, kw_only=True)
class Score:
    """Of several guesses: the mean of the errors' sizes in percent, the mean error with its sign, and Kendall's tau of
    the two orders, None where that needs more."""

    count: int
    error: float
    bias: float
    tau: float | None


@dataclass(frozen=True, kw_only=True)
class Overhead:
    """What looking costs: `percent` of a step, and whether that is within `bound`. `of`: which clocks, on what."""

    of: str
    percent: float
    between: tuple[float, float] | None
    bound: float

    @property
    def within(self) -> bool:
        return self.percent <= self.bound


def score(guesses: Sequence[Guess]) -> Score | None:
    """None of nothing."""
    if not guesses:
        return None
    errors = [each.error for each in guesses]
    return Score(
        count=len(guesses),
        error=statistics.fmean(map(abs, errors)),
        bias=statistics.fmean(errors),
        tau=kendall([(each.predicted, each.measured) for each in guesses]),
    )


def kendall(pairs: Iterable[tuple[float, float]]) -> float | None:
    """Kendall's tau-b of two orders: 1 where they are the same, -1 where one is the other's reverse. None where either
    has less than two different values."""
    agree = ties_a = ties_b = total = 0
    for (a, b), (c, d) in itertools.combinations(pairs, 2):
        total += 1
        ties_a += a == c
        ties_b += b == d
        if a != c and b != d:
            agree += 1 if (a < c) == (b < d) else -1
    both = (total - ties_a) * (total - ties_b)
    return agree / math.sqrt(both) if both else None


def overheads(workloads: Sequence[Workload], modules: Sequence[Record]) -> list[Overhead]:
    """Of the clocks of phases in every workload, and of both kinds where bench_modules has compared steps with and
    without; the between are quartiles, or the least and the most of the cells."""
    found = []
    for workload in workloads:
        shares = []
        for cell in workload.measured:
            cost, step = cell.of("profiler_overhead_us_per_step"), cell.of("step_ms_p50")
            if cost and step and step.mean:
                shares.append(100 * cost.mean / 1e3 / step.mean)
        if shares:
            of = f"clocks of phases, counted in {workload.title}"
            ends = (min(shares), max(shares))
            found.append(Overhead(of=of, percent=statistics.median(shares), between=ends, bound=TIMERS))
    for record in modules:
        for arm, bound in (("phases", TIMERS), ("modules", SPANS)):
            key = f"overhead/{arm}_percent"
            if key in record.summary:
                ends = (record.summary[f"{key}_p25"], record.summary[f"{key}_p75"])
                of = f"clocks of {arm}, in turns with steps without, {record.config['model']['name']} {record.run_id}"
                found.append(Overhead(of=of, percent=record.summary[key], between=ends, bound=bound))
    return found


def repeated(workload: Workload) -> list[Cell]:
    """Cells with several fresh processes, the least steady first."""
    cells = [cell for cell in workload.measured if len(cell.records) > 1]
    return sorted(cells, key=lambda cell: -(step.cv if (step := cell.of("step_ms_p50")) else 0.0))


def drifted(workload: Workload) -> tuple[Cell, Drift] | None:
    """The cell with most repeats, which a sweep measures again and again, and what it says of the machine over time;
    None of fewer than three."""
    cell = max(repeated(workload), key=lambda each: len(each.records), default=None)
    if cell is None or len(cell.records) < 3:
        return None
    times = [(seconds(record.started), record.summary["step_ms_p50"]) for record in cell.records]
    others = {r.run_id: seconds(r.started) for each in workload.measured for r in each.records if each is not cell}
    found = drift(times, others, limit(workload.kind))
    return (cell, found) if found else None


def allowed(workload: Workload) -> float:
    """Percent by which a step may vary over fresh processes."""
    return 100 * limit(workload.kind)
