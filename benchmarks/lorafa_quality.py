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
import sys
from collections.abc import Sequence
from pathlib import Path

import comparison
import fresh_runs
import quality_table
from fresh_runs import Make, Runs, Words
from llmsys.job import Record
from quality_contestants import CONTESTANTS, FAMILIES, FEW, Contestant, Family, contestants

NAME = "lorafa_quality"
RECORDS = Path(__file__).parent / "records"
GRID = (1e-4, 2e-4, 5e-4, 1e-3, 2e-3, 5e-3, 1e-2, 2e-2, 5e-2)


class Comparison(comparison.Comparison[Contestant]):
    """One family's contestants at their rates and seeds."""

    def __init__(self, family: Family, asked: argparse.Namespace) -> None:
        super().__init__(contestants(family, asked), grid=GRID, tuning=family.tuning, seeds=asked.seeds)
        self.family, self.asked, self.higher = family, asked, family.higher
        if family.base is not None and "model.weights=random" not in asked.overrides:
            self.base = (f"+exp={family.base}", f"results={asked.results}", "reuse=any")

    def words(self, contestant: Contestant, rate: float, seed: int) -> Words:
        return (
            *self.family.overrides,
            *contestant.overrides,
            f"name={NAME}",
            f"results={self.asked.results}",
            "reuse=any",
            f"++train.lr_by_method.{contestant.method}={rate:g}",
            f"train.seed={seed}",
            f"train.threads={self.asked.threads}",
            *self.asked.overrides,
        )

    def value(self, record: Record) -> float:
        return self.family.value(record)

    def start(self, contestant: Contestant) -> float:
        return self.family.starts[contestant.method]


def record(comparisons: Sequence[Comparison], asked: argparse.Namespace) -> Record:
    """What is there of all comparisons, as one record: numbers under `<family>/<contestant>/<what>`."""
    families = {each.family.name: dataclasses.asdict(each.family) for each in comparisons}
    config = {"families": families, "grid": list(GRID), "seeds": asked.seeds, "overrides": asked.overrides}
    summary: dict[str, float] = {}
    samples: dict[str, list[float]] = {}
    for compared in comparisons:
        for each in compared.contestants:
            key = f"{compared.family.name}/{each.name}"
            numbers, lists = compared.numbers(each)
            numbers |= {"trainable_params": each.trainable_params, "accounted_bytes": each.accounted_bytes}
            numbers |= {} if each.r is None else {"r": each.r}
            summary |= {f"{key}/{what}": number for what, number in numbers.items()}
            samples |= {f"{key}/{what}": values for what, values in lists.items()}
    runs = [run for compared in comparisons for run in compared.records()]
    return comparison.record(NAME, config, runs, asked.threads, summary, samples)


def arguments(argv: Sequence[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--full", action="store_true", help="every family and contestant, and paired seeds")
    parser.add_argument("--families", nargs="+", choices=list(FAMILIES), help="default: encoder; with --full all")
    parser.add_argument("--contestants", nargs="+", choices=CONTESTANTS, help="default: four; with --full all")
    parser.add_argument("--seeds", type=int, help="paired seeds at the best rate (default: 5 with --full, else none)")
    parser.add_argument("--parallel", type=int, default=2, help="runs at a time")
    comparison.options(parser)
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
        number = sum(len(each.contestants) for each in comparisons) * (comparison.RATES_EXPECTED + asked.seeds)
        there = sum(len(each.records()) for each in comparisons)
        make = fresh_runs.nothing if asked.show else Runs(asked.parallel, max(number - there, 0))
    code = 0
    for each in comparisons:
        try:
            each.run(make)
        except KeyboardInterrupt:
            code = 130
            break
        except RuntimeError:  # said already; the other families go on
            code = 1
    whole = record(comparisons, asked)
    whole.leave(Path(asked.results))
    print(quality_table.table(whole))
    if asked.keep:
        comparison.keep([whole, *(run for each in comparisons for run in each.records())], RECORDS)
    if code:
        sys.exit(code)
    return whole


if __name__ == "__main__":
    main(sys.argv[1:])
