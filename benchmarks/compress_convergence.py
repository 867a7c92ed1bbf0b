"""What compressing gradients costs in loss: ten ways to exchange them, `llama_6m` from random weights on four ranks.

    python benchmarks/compress_convergence.py                  # rates of four ways on one seed: 10 minutes
    python benchmarks/compress_convergence.py --full           # ten ways, 5 paired seeds: 70 minutes on two cores
    python benchmarks/compress_convergence.py --full --show    # the table of what is there; makes no run
    python benchmarks/compress_convergence.py --kept           # the table of the committed record

The setting is conf/exp/compress_convergence.yaml. The contestants:

    ssgd             whole gradients
    powersgd         Power-SGD, r = 4
    acpsgd           ACP-SGD, r = 4: half the bytes of `powersgd`
    acpsgd_2r        ACP-SGD, r = 8: the bytes of `powersgd`, in one round where that takes two
    acp_no_feedback  `acpsgd` without error feedback
    acp_no_reuse     `acpsgd` that projects onto a new random factor in each step
    topk             of each tensor the largest 0.1 %
    randomk          of each tensor as many random elements as cost the bytes of `topk`: on W ranks W times as many,
                     since an all-gather of (value, place) makes a rank send 8 k (W - 1), an all-reduce 8 k (W - 1) / W
    sign             Sign-SGD with majority vote
    efsign           scaled sign with error feedback

Each is trained at its own best learning rate, found on a seed of its own, and compared over paired seeds
(`comparison.py`): validation loss at equal steps; at equal bytes and equal time by where its curve is. The
optimizer is AdamW for all, as the trainer has it. The four that the targets are about come first.

The runs are ordinary ones, `results/compress_convergence/<id>`, made one after another by rank processes that are kept
(`kept_ranks.py`), or as `python -m llmsys` with `--fresh`. The table is a record of its own beside them, and `--keep`
copies all of these records to benchmarks/records.
"""

from __future__ import annotations

import argparse
import contextlib
import functools
import sys
from collections.abc import Sequence
from dataclasses import dataclass

import comparison
import fresh_runs
from fresh_runs import Make, Runs, Words
from kept_ranks import Ranks
from llmsys import compose, schema
from llmsys.job import Record

NAME = "compress_convergence"
GRID = (2.5e-4, 5e-4, 1e-3, 2e-3, 4e-3, 8e-3, 1.6e-2)
TUNING = 100
R, DENSITY = 4, 0.001
BATCH = 8
"""Of the experiment: each rank has its share in one piece."""


@dataclass(frozen=True, kw_only=True)
class Contestant:
    """A way to exchange gradients, on so many ranks. `start`: the rate to begin the search at."""

    name: str
    overrides: Words
    world: int
    start: float = 2e-3


WORLD = 4
"""For whom bytes are counted."""
FEWER = 2
"""On which the linear ones are trained."""
ACP = ("compress=acpsgd", f"compress.r={R}")
LINEAR: dict[str, Words] = {
    "ssgd": ("compress=none",),
    "powersgd": ("compress=powersgd", f"compress.r={R}"),
    "acpsgd": ACP,
    "acpsgd_2r": ("compress=acpsgd", f"compress.r={2 * R}"),
    "randomk": ("compress=randomk", f"compress.density={WORLD * DENSITY:g}"),
    "acp_no_feedback": (*ACP, "compress.error_feedback=false"),
    "acp_no_reuse": (*ACP, "compress.reuse=false"),
}
OTHERS: dict[str, Words] = {
    "topk": ("compress=topk", f"compress.density={DENSITY:g}"),
    "efsign": ("compress=efsign",),
    "sign": ("compress=sign",),
}
CONTESTANTS = {
    **{name: Contestant(name=name, overrides=words, world=FEWER) for name, words in LINEAR.items()},
    **{name: Contestant(name=name, overrides=words, world=WORLD) for name, words in OTHERS.items()},
}
TARGETS = ("ssgd", "powersgd", "acpsgd", "acpsgd_2r")
GROUPS = (TARGETS, tuple(name for name in LINEAR if name not in TARGETS), tuple(OTHERS))
"""One after another: what the targets are about is there first."""


class Comparison(comparison.Comparison[Contestant]):
    """Some of the contestants."""

    def __init__(self, chosen: Sequence[Contestant], asked: argparse.Namespace) -> None:
        super().__init__(chosen, grid=GRID, tuning=(TUNING,), seeds=asked.seeds)
        self.asked = asked

    def words(self, contestant: Contestant, rate: float, seed: int) -> Words:
        return (
            f"+exp={NAME}",
            *contestant.overrides,
            f"results={self.asked.results}",
            "reuse=any",
            f"train.lr_by_method.full={rate:g}",
            f"train.seed={seed}",
            f"train.world={contestant.world}",
            f"train.micro_batch={BATCH // contestant.world}",
            f"train.threads={self.asked.threads}",
            *self.asked.overrides,
        )

    def value(self, record: Record) -> float:
        return record.summary["val_loss"]

    def start(self, contestant: Contestant) -> float:
        return contestant.start


def record(comparisons: Sequence[Comparison], asked: argparse.Namespace) -> Record:
    """What is there, as one record."""
    raise NotImplementedError


def arguments(argv: Sequence[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--full", action="store_true", help="every contestant, and paired seeds")
    parser.add_argument("--contestants", nargs="+", choices=list(CONTESTANTS), help="default: four; with --full all")
    parser.add_argument("--seeds", type=int, help="paired seeds at the best rate (default: 5 with --full, else none)")
    comparison.options(parser)
    asked = parser.parse_args(argv)
    asked.contestants = asked.contestants or (list(CONTESTANTS) if asked.full else list(TARGETS))
    asked.seeds = (5 if asked.full else 0) if asked.seeds is None else asked.seeds
    return asked


def main(argv: Sequence[str], make: Make | None = None) -> None:
    asked = arguments(argv)
    groups = [[CONTESTANTS[name] for name in group if name in asked.contestants] for group in GROUPS]
    comparisons = [Comparison(group, asked) for group in groups if group]
    there = sum(len(each.records()) for each in comparisons)
    expected = len(asked.contestants) * (comparison.RATES_EXPECTED + asked.seeds) - there
    with contextlib.closing(Ranks(max(expected, 0))) as ranks:
        for each in comparisons:
            each.run(ranks if make is None else make)


if __name__ == "__main__":
    main(sys.argv[1:])
