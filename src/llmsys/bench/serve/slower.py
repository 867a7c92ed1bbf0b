"""What an engine itself makes of the passes that its model alone takes: how many times as long they take in it.

A load that was measured and the same load as it is predicted from passes alone (`predict`) give one number, that by
which the mean latency to the last token is the same. The same engine's other loads are predicted with it. It stands for
kernels, the scheduler and Python between passes alike, and says nothing of which.
"""

from __future__ import annotations

import dataclasses
import math
import statistics
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

from llmsys import schema
from llmsys.bench.serve.load import Request
from llmsys.bench.serve.outcome import Outcome
from llmsys.bench.serve.pace import Pace
from llmsys.bench.serve.predict import Batching, predict
from llmsys.job import Record

KEY = "slower"
RANGE = (1 / 64, 64.0)
STEPS = 24
"""Halvings of its logarithm: to a millionth."""


def of_loads(
    loads: Sequence[Sequence[Request]], measured: Sequence[Sequence[Outcome]], pace: Pace, how: Batching
) -> float | None:
    """None where no factor of `RANGE` makes the mean latency what was measured."""
    wanted = statistics.fmean(each.waited_s + each.e2e_s for one in measured for each in one)

    def found(slower: float) -> float:
        own = dataclasses.replace(pace, slower=slower)
        return statistics.fmean(each.waited_s + each.e2e_s for one in loads for each in predict(one, own, how))

    low, high = map(math.log, RANGE)
    if not found(RANGE[0]) < wanted < found(RANGE[1]):
        return None
    for _ in range(STEPS):
        middle = (low + high) / 2
        low, high = (middle, high) if found(math.exp(middle)) < wanted else (low, middle)
    return math.exp((low + high) / 2)


class Known(NamedTuple):
    """Of a run, with at most so many requests under way."""

    factor: float
    under_way: int


def of_record(path: Path, config: schema.Config) -> Known:
    """As a run of `bench_serve` has found it. ValueError for a record of another task, model or server, or one that
    found none."""
    try:
        record = Record.read(path.parent)
    except ValueError as error:
        raise ValueError(f"task.served: not a record: {error}") from None
    assert record is not None, path
    if record.task != "bench_serve" or record.status != "ok":
        raise ValueError(f"task.served={path}: must be a finished run of bench_serve, and is one of {record.task}")
    theirs = schema.build(record.config)
    for group in ("model", "server"):
        was, now = (dataclasses.asdict(getattr(each, group)) for each in (theirs, config))
        other = [f"{group}.{key}={was.get(key)} and not {now.get(key)}" for key in {**was, **now}
                 if key not in ("python", "name") and was.get(key) != now.get(key)]  # fmt: skip
        if other:
            raise ValueError(f"task.served={path}: is of another {group}: {', '.join(other)}")
    if KEY not in record.summary:
        raise ValueError(f"task.served={path}: has no {KEY}: run it with task.speeds")
    return Known(record.summary[KEY], int(record.summary["under_way_max"]))
