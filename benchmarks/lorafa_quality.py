"""LoRA-FA's accuracy against full fine-tuning and LoRA: at equal rank, equal trained parameters and equal memory.

    python benchmarks/lorafa_quality.py                            # rates of the encoder on one seed: 15 minutes
    python benchmarks/lorafa_quality.py --full                     # three families, 5 paired seeds: two hours
    python benchmarks/lorafa_quality.py --full --families causal   # stopped, it goes on where it was, run by run
    python benchmarks/lorafa_quality.py --full --show              # the table of what is there; makes no run
    python benchmarks/lorafa_quality.py --kept                     # the table of the committed record

These are the comparisons that reviewers of the paper (arXiv 2308.03303) asked for. The contestants:

    full                 every weight
    lora                 LoRA of r = 8 by our own fused functions, so that only the frozen A makes the difference
    lora_peft            LoRA of r = 8 as peft does it, with peft's own draw of A
    lorafa_rank          LoRA-FA of the same r
    lorafa_params        LoRA-FA of the r at which as many parameters are trained
    lorafa_memory        LoRA-FA of the largest r whose accounted memory is not above that of `lora`
    lorafa_peft_memory   LoRA-FA of the largest r whose accounted memory is not above that of `lora_peft`
    lorafa_r32           LoRA-FA of r = 32

Accounted memory is weights, gradients, optimizer and saved tensors by the cost model. First each contestant is trained
at rates of one grid, the same for all, on a seed of its own, until its best rate is found (`paired.to_try`). Where one
seed cannot tell neighbours apart (`Family.tuning`), the two best are trained on a second one too, and the better mean
wins. Then it is trained at that rate on other seeds. A seed draws adapters, heads and the order of the data alike for
all, so differences are taken seed by seed, with the end of their one-sided 90 % interval on the bad side (`paired`).

Two runs at a time on one thread each use two cores best. The runs are ordinary ones, `results/lorafa_quality/<id>`; the
table is a record of its own beside them, and `--keep` copies all of these records to benchmarks/records.
"""

from __future__ import annotations

import argparse
import dataclasses
import hashlib
import json
import math
import statistics
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path

import fresh_runs
import paired
import quality_table
from fresh_runs import Make, Runs, Words
from llmsys.job import Record
from quality_contestants import CONTESTANTS, FAMILIES, FEW, Contestant, Family, contestants

NAME = "lorafa_quality"
RECORDS = Path(__file__).parent / "records"
GRID = (1e-4, 2e-4, 5e-4, 1e-3, 2e-3, 5e-3, 1e-2, 2e-2, 5e-2)
FINALISTS = 2
"""Rates that are trained on every tuning seed."""
RATES_EXPECTED = 5
"""Runs of a contestant until its best rate is known, for the estimate of the time left."""


def words(family: Family, contestant: Contestant, rate: float, seed: int, asked: argparse.Namespace) -> Words:
    """The command line of one run."""
    return (
        *family.overrides,
        *contestant.overrides,
        f"name={NAME}",
        f"results={asked.results}",
        "reuse=any",
        f"++train.lr_by_method.{contestant.method}={rate:g}",
        f"train.seed={seed}",
        f"train.threads={asked.threads}",
        *asked.overrides,
    )


class Comparison:
    """One family's contestants at their rates and seeds."""

    def __init__(self, family: Family, asked: argparse.Namespace) -> None:
        self.family, self.asked = family, asked
        self.contestants = contestants(family, asked)

    def run(self, make: Make) -> None:
        """Has the base made, then whatever runs are still needed. KeyboardInterrupt and RuntimeError as of `Runs`."""
        if not self._has_base():
            make([self._base])
        while wanted := [
            words(self.family, each, GRID[i], self.family.tuning[0], self.asked)
            for each in self.contestants
            for i in paired.to_try(len(GRID), self._start(each), self._heights(self.searched(each)))
        ]:
            make(wanted)
            if all(fresh_runs.finished(each) is None for each in wanted):  # nothing makes runs
                break
        make(
            [
                words(self.family, each, GRID[i], seed, self.asked)
                for each in self.contestants
                for i in self.finalists(each)
                for seed in self.family.tuning[1:]
            ]
        )
        rates = {each: self.rate(each) for each in self.contestants if self.settled(each)}
        make(
            [
                words(self.family, each, rate, seed, self.asked)
                for seed in range(self.asked.seeds)
                for each, rate in rates.items()
                if rate is not None
            ]
        )

    def searched(self, contestant: Contestant) -> dict[int, Record]:
        """Place on the grid -> run on the tuning seed: the search for the best rate, as far as its runs are there."""
        found: dict[int, Record] = {}
        while True:
            places = paired.to_try(len(GRID), self._start(contestant), self._heights(found))
            there = {i: self._record(contestant, GRID[i], self.family.tuning[0]) for i in places}
            if not any(there.values()):
                return dict(sorted(found.items()))
            found |= {i: record for i, record in there.items() if record is not None}

    def finalists(self, contestant: Contestant) -> list[int]:
        """The places of the best rates of the search, the best first; none where one tuning seed is enough."""
        heights = self._heights(self.searched(contestant))
        wanted = self.asked.seeds and len(self.family.tuning) > 1
        return sorted(heights, key=lambda i: (-heights[i], i))[:FINALISTS] if wanted else []

    def finals(self, contestant: Contestant) -> dict[int, list[Record]]:
        """Place of a finalist -> its runs on the tuning seeds, those that are there."""
        seeds, places = self.family.tuning, self.finalists(contestant)
        runs = {i: [self._record(contestant, GRID[i], seed) for seed in seeds] for i in places}
        return {i: [run for run in each if run is not None] for i, each in runs.items()}

    def rate(self, contestant: Contestant) -> float | None:
        """The best rate, as far as is known."""
        heights = self._heights(self.searched(contestant))
        finals = self.finals(contestant)
        if finals and all(len(runs) == len(self.family.tuning) for runs in finals.values()):
            heights = {i: statistics.fmean(map(self._height, runs)) for i, runs in finals.items()}
        best = paired.summit(heights)
        return None if best is None else GRID[best]

    def settled(self, contestant: Contestant) -> bool:
        """Whether the search for its rate is over."""
        return not paired.to_try(len(GRID), self._start(contestant), self._heights(self.searched(contestant))) and all(
            len(runs) == len(self.family.tuning) for runs in self.finals(contestant).values()
        )

    def by_seed(self, contestant: Contestant) -> dict[int, Record]:
        """Seed -> run at the best rate, of those that are there; one that diverged is left out."""
        rate = self.rate(contestant)
        seeds = () if rate is None else range(self.asked.seeds)
        found = {seed: self._record(contestant, rate or 0.0, seed) for seed in seeds}
        return {seed: record for seed, record in found.items() if record is not None and record.status == "ok"}

    def records(self) -> list[Record]:
        """Of every run that is there; none where the base they start from is yet to be made."""
        if not self._has_base():
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

    @property
    def _base(self) -> Words:
        return (f"+exp={self.family.base}", f"results={self.asked.results}", "reuse=any")

    def _has_base(self) -> bool:
        random = "model.weights=random" in self.asked.overrides
        return self.family.base is None or random or fresh_runs.finished(self._base) is not None

    def _start(self, contestant: Contestant) -> int:
        return GRID.index(self.family.starts[contestant.method])

    def _heights(self, found: Mapping[int, Record]) -> dict[int, float]:
        """As `paired.to_try` has them."""
        return {i: self._height(run) for i, run in found.items()}

    def _height(self, run: Record) -> float:
        sign = 1 if self.family.higher else -1
        return sign * self.family.value(run) if run.status == "ok" else -math.inf

    def _record(self, contestant: Contestant, rate: float, seed: int) -> Record | None:
        return fresh_runs.finished(words(self.family, contestant, rate, seed, self.asked))


def record(comparisons: Sequence[Comparison], asked: argparse.Namespace) -> Record:
    """What is there of all comparisons, as one record: numbers under `<family>/<contestant>/<what>`."""
    from llmsys.profile import environment

    families = {each.family.name: dataclasses.asdict(each.family) for each in comparisons}
    config = {"families": families, "grid": list(GRID), "seeds": asked.seeds, "overrides": asked.overrides}
    summary: dict[str, float] = {}
    samples: dict[str, list[float]] = {}
    for comparison in comparisons:
        for each in comparison.contestants:
            key = f"{comparison.family.name}/{each.name}"
            rates, seeds = comparison.searched(each), comparison.by_seed(each)
            ended = {GRID[i]: run for i, run in rates.items() if run.status == "ok"}
            summary |= {
                f"{key}/trainable_params": each.trainable_params,
                f"{key}/accounted_bytes": each.accounted_bytes,
            }
            summary |= {} if each.r is None else {f"{key}/r": each.r}
            summary |= {f"{key}/settled": float(comparison.settled(each))}
            if rate := comparison.rate(each):
                summary[f"{key}/lr"] = rate
            value = comparison.family.value
            samples |= {f"{key}/rates": list(ended), f"{key}/by_rate": [value(run) for run in ended.values()]}
            finals = {
                GRID[i]: statistics.fmean(map(value, runs))
                for i, runs in comparison.finals(each).items()
                if len(runs) == len(comparison.family.tuning) and all(run.status == "ok" for run in runs)
            }
            samples |= {f"{key}/finalists": list(finals), f"{key}/by_finalist": list(finals.values())}
            samples |= {f"{key}/diverged": [GRID[i] for i in rates if GRID[i] not in ended]}
            samples |= {f"{key}/seeds": list(seeds), f"{key}/by_seed": [value(run) for run in seeds.values()]}
    runs = [each for comparison in comparisons for each in comparison.records()]
    return Record(
        name=NAME,
        run_id=hashlib.sha256(json.dumps(config, sort_keys=True).encode()).hexdigest()[:12],
        task="benchmark",
        status="ok",
        config=config,
        env=environment.describe("cpu", asked.threads),
        started=min((run.started for run in runs), default=""),
        seconds=round(sum(run.seconds for run in runs), 1),
        summary=summary,
        samples=samples,
    )


def keep(comparisons: Sequence[Comparison], whole: Record, folder: Path) -> None:
    """Copies the records (no other files) to `folder/<experiment>/<run id>`, the place of results taken out."""
    for each in (whole, *(run for comparison in comparisons for run in comparison.records())):
        config = {**each.config, "results": "results"} if "results" in each.config else each.config
        to = folder / each.name / each.run_id
        to.mkdir(parents=True, exist_ok=True)
        dataclasses.replace(each, config=config).write(to)


def arguments(argv: Sequence[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--full", action="store_true", help="every family and contestant, and paired seeds")
    parser.add_argument("--families", nargs="+", choices=list(FAMILIES), help="default: encoder; with --full all")
    parser.add_argument("--contestants", nargs="+", choices=CONTESTANTS, help="default: four; with --full all")
    parser.add_argument("--seeds", type=int, help="paired seeds at the best rate (default: 5 with --full, else none)")
    parser.add_argument("--parallel", type=int, default=2, help="runs at a time")
    parser.add_argument("--threads", type=int, default=1, help="of a run")
    parser.add_argument("--results", default="results", help="where the runs lie")
    parser.add_argument("--show", action="store_true", help="make no run: the table of what is there")
    parser.add_argument("--keep", action="store_true", help="copy the records to benchmarks/records")
    parser.add_argument("--kept", action="store_true", help="the table of the record in benchmarks/records")
    parser.add_argument("--override", dest="overrides", nargs="+", default=[], help="settings of every run: KEY=VALUE")
    asked = parser.parse_args(argv)
    asked.families = asked.families or (["causal", "encoder", "seq2seq"] if asked.full else ["encoder"])
    asked.contestants = asked.contestants or (CONTESTANTS if asked.full else FEW)
    asked.seeds = (5 if asked.full else 0) if asked.seeds is None else asked.seeds
    return asked


def main(argv: Sequence[str], make: Make | None = None) -> Record:
    """Compares, writes the record, prints its table, and returns it; after Ctrl-C so of what is there, and exits."""
    asked = arguments(argv)
    if asked.kept:
        whole = quality_table.newest(RECORDS / NAME)
        print(quality_table.table(whole))
        return whole
    comparisons = [Comparison(FAMILIES[name], asked) for name in asked.families]
    if make is None:
        number = sum(len(each.contestants) for each in comparisons) * (RATES_EXPECTED + asked.seeds)
        there = sum(len(each.records()) for each in comparisons)
        make = fresh_runs.nothing if asked.show else Runs(asked.parallel, max(number - there, 0))
    code = 0
    for comparison in comparisons:
        try:
            comparison.run(make)
        except KeyboardInterrupt:
            code = 130
            break
        except RuntimeError:  # said already; the other families go on
            code = 1
    whole = record(comparisons, asked)
    folder = Path(asked.results) / NAME / whole.run_id
    folder.mkdir(parents=True, exist_ok=True)
    whole.write(folder)
    print(quality_table.table(whole))
    if asked.keep:
        keep(comparisons, whole, RECORDS)
    if code:
        sys.exit(code)
    return whole


if __name__ == "__main__":
    main(sys.argv[1:])
