"""Contestants trained each at its own best learning rate, then side by side on other seeds: what all comparisons share.

First each contestant is trained at rates of one grid, the same for all, on a seed of its own, until its best rate is
found (`paired.to_try`). Where one seed cannot tell neighbours apart (more than one in `tuning`), the two best are
trained on the others too, and the better mean wins. Then it is trained at that rate on the seeds 0, 1, ... A seed draws
new weights and the order of the data alike for all, so differences are taken seed by seed.

The runs are ordinary ones, and one that is finished is not made again: a comparison may be stopped at any moment.
"""

from __future__ import annotations

import argparse
import dataclasses
import hashlib
import json
import math
import statistics
from abc import ABC, abstractmethod
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, Generic, TypeVar

import fresh_runs
import paired
from fresh_runs import Make, Words
from llmsys.job import Record

FINALISTS = 2
"""Rates that are trained on every tuning seed."""
RATES_EXPECTED = 5
"""Runs of a contestant until its best rate is known, for the estimate of the time left."""

Contestant = TypeVar("Contestant")


class Comparison(ABC, Generic[Contestant]):
    """Contestants at their rates and seeds. `higher`: more of `value` is better. `base`: the run all start from."""

    higher = False
    base: Words | None = None

    def __init__(
        self, contestants: Sequence[Contestant], *, grid: Sequence[float], tuning: Sequence[int], seeds: int
    ) -> None:
        self.contestants, self.grid, self.tuning, self.seeds = list(contestants), tuple(grid), tuple(tuning), seeds

    @abstractmethod
    def words(self, contestant: Contestant, rate: float, seed: int) -> Words:
        """The command line of one run."""

    @abstractmethod
    def value(self, record: Record) -> float:
        """What is compared, of a run that ended well."""

    @abstractmethod
    def start(self, contestant: Contestant) -> float:
        """The rate of the grid to begin the search at."""

    def run(self, make: Make) -> None:
        """Has the base made, then whatever runs are still needed. KeyboardInterrupt and RuntimeError as of `Runs`."""
        if self.base is not None and not self.has_base():
            make([self.base])
        while wanted := [
            self.words(each, self.grid[i], self.tuning[0])
            for each in self.contestants
            for i in self._to_try(each, self.searched(each))
        ]:
            make(wanted)
            if all(fresh_runs.finished(each) is None for each in wanted):  # nothing makes runs
                break
        make(
            [
                self.words(each, self.grid[i], seed)
                for each in self.contestants
                for i in self.finalists(each)
                for seed in self.tuning[1:]
            ]
        )
        rates = [(each, self.rate(each)) for each in self.contestants if self.settled(each)]
        make([self.words(each, rate, seed) for seed in range(self.seeds) for each, rate in rates if rate is not None])

    def searched(self, contestant: Contestant) -> dict[int, Record]:
        """Place on the grid -> run on the tuning seed: the search for the best rate, as far as its runs are there."""
        found: dict[int, Record] = {}
        while True:
            there = {i: self._record(contestant, self.grid[i], self.tuning[0]) for i in self._to_try(contestant, found)}
            if not any(there.values()):
                return dict(sorted(found.items()))
            found |= {i: record for i, record in there.items() if record is not None}

    def finalists(self, contestant: Contestant) -> list[int]:
        """The places of the best rates of the search, the best first; none where one tuning seed is enough."""
        heights = self._heights(self.searched(contestant))
        wanted = self.seeds and len(self.tuning) > 1
        return sorted(heights, key=lambda i: (-heights[i], i))[:FINALISTS] if wanted else []

    def finals(self, contestant: Contestant) -> dict[int, list[Record]]:
        """Place of a finalist -> its runs on the tuning seeds, those that are there."""
        places = self.finalists(contestant)
        runs = {i: [self._record(contestant, self.grid[i], seed) for seed in self.tuning] for i in places}
        return {i: [run for run in each if run is not None] for i, each in runs.items()}

    def rate(self, contestant: Contestant) -> float | None:
        """The best rate, as far as is known."""
        heights = self._heights(self.searched(contestant))
        finals = self.finals(contestant)
        if finals and all(len(runs) == len(self.tuning) for runs in finals.values()):
            heights = {i: statistics.fmean(map(self._height, runs)) for i, runs in finals.items()}
        best = paired.summit(heights)
        return None if best is None else self.grid[best]

    def settled(self, contestant: Contestant) -> bool:
        """Whether the search for its rate is over."""
        return not self._to_try(contestant, self.searched(contestant)) and all(
            len(runs) == len(self.tuning) for runs in self.finals(contestant).values()
        )

    def by_seed(self, contestant: Contestant) -> dict[int, Record]:
        """Seed -> run at the best rate, of those that are there; one that diverged is left out."""
        rate = self.rate(contestant)
        seeds = () if rate is None else range(self.seeds)
        found = {seed: self._record(contestant, rate or 0.0, seed) for seed in seeds}
        return {seed: record for seed, record in found.items() if record is not None and record.status == "ok"}

    def records(self) -> list[Record]:
        """Of every run that is there; none where the base they start from is yet to be made."""
        if not self.has_base():
            return []
        found = [
            record
            for each in self.contestants
            for record in (
                *self.searched(each).values(),
                *(run for runs in self.finals(each).values() for run in runs),
                *self.by_seed(each).values(),
            )
        ]
        return list({record.run_id: record for record in found}.values())

    def has_base(self) -> bool:
        return self.base is None or fresh_runs.finished(self.base) is not None

    def numbers(self, contestant: Contestant) -> tuple[dict[str, float], dict[str, list[float]]]:
        """(summary, samples) of a contestant as the comparison's record has them, without the prefix of their keys."""
        rates, seeds = self.searched(contestant), self.by_seed(contestant)
        ended = {self.grid[i]: run for i, run in rates.items() if run.status == "ok"}
        finals = {
            self.grid[i]: statistics.fmean(map(self.value, runs))
            for i, runs in self.finals(contestant).items()
            if len(runs) == len(self.tuning) and all(run.status == "ok" for run in runs)
        }
        rate = self.rate(contestant)
        return {"settled": float(self.settled(contestant)), **({} if rate is None else {"lr": rate})}, {
            "rates": list(ended),
            "by_rate": [self.value(run) for run in ended.values()],
            "finalists": list(finals),
            "by_finalist": list(finals.values()),
            "diverged": [self.grid[i] for i in rates if self.grid[i] not in ended],
            "seeds": list(seeds),
            "by_seed": [self.value(run) for run in seeds.values()],
        }

    def _to_try(self, contestant: Contestant, found: Mapping[int, Record]) -> list[int]:
        return paired.to_try(len(self.grid), self.grid.index(self.start(contestant)), self._heights(found))

    def _heights(self, found: Mapping[int, Record]) -> dict[int, float]:
        """As `paired.to_try` has them."""
        return {i: self._height(run) for i, run in found.items()}

    def _height(self, run: Record) -> float:
        return (1 if self.higher else -1) * self.value(run) if run.status == "ok" else -math.inf

    def _record(self, contestant: Contestant, rate: float, seed: int) -> Record | None:
        return fresh_runs.finished(self.words(contestant, rate, seed))


def record(
    name: str,
    config: dict[str, Any],
    runs: Sequence[Record],
    threads: int,
    summary: dict[str, float],
    samples: dict[str, list[float]],
) -> Record:
    """What is there of a whole comparison as a record of its own; its id is a hash of `config`."""
    from llmsys.profile import environment

    config = json.loads(json.dumps(config))  # as it will be read again: lists in place of tuples
    return Record(
        name=name,
        run_id=hashlib.sha256(json.dumps(config, sort_keys=True).encode()).hexdigest()[:12],
        task="benchmark",
        status="ok",
        config=config,
        env=environment.describe("cpu", threads),
        started=min((run.started for run in runs), default=""),
        seconds=round(sum(run.seconds for run in runs), 1),
        summary=summary,
        samples=samples,
    )


def keep(records: Iterable[Record], folder: Path) -> None:
    """Copies the records (no other files) to `folder/<experiment>/<run id>`, the place of results taken out."""
    for each in records:
        config = {**each.config, "results": "results"} if "results" in each.config else each.config
        to = folder / each.name / each.run_id
        to.mkdir(parents=True, exist_ok=True)
        dataclasses.replace(each, config=config).write(to)


def options(parser: argparse.ArgumentParser) -> None:
    """What every comparison may be asked."""
    parser.add_argument("--threads", type=int, default=1, help="of a run, or of each of its ranks")
    parser.add_argument("--results", default="results", help="where the runs lie")
    parser.add_argument("--show", action="store_true", help="make no run: the table of what is there")
    parser.add_argument("--keep", action="store_true", help="copy the records to benchmarks/records")
    parser.add_argument("--kept", action="store_true", help="the table of the record in benchmarks/records")
    parser.add_argument("--override", dest="overrides", nargs="+", default=[], help="settings of every run: KEY=VALUE")
