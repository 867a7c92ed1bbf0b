"""What compressing gradients costs in loss: ten ways to exchange them, `llama_6m` from random weights.

    python benchmarks/compress_convergence.py                  # rates of the first four on one seed: 15 minutes
    python benchmarks/compress_convergence.py --full           # ten ways, 5 paired seeds: two hours on two cores
    python benchmarks/compress_convergence.py --full --show    # the table of what is there; makes no run
    python benchmarks/compress_convergence.py --kept           # the table of the committed record
    python benchmarks/compress_convergence.py --kept --keep --times benchmarks/records/compress_iteration/<id> \\
        --variant <variant>                                    # with a column for equal time, from those iterations

The setting is conf/exp/compress_convergence.yaml. The contestants:

    ssgd             whole gradients
    powersgd         Power-SGD, r = 4
    acpsgd           ACP-SGD, r = 4: half the bytes of `powersgd`
    acpsgd_2r        ACP-SGD, r = 8: the bytes of `powersgd`, in one round where that takes two
    randomk          of each tensor as many random elements as cost the bytes of `topk`: on W ranks W times as many,
                     since an all-gather of k values and places makes a rank send 8 k (W - 1) bytes, an all-reduce of
                     k values 8 k (W - 1) / W
    acp_no_feedback  `acpsgd` without error feedback
    acp_no_reuse     `acpsgd` that projects onto a new random factor in each step
    topk             of each tensor the largest 0.1 %
    efsign           scaled sign with error feedback
    sign             Sign-SGD with majority vote

Each is trained at its own best learning rate, found on a seed of its own, and compared over paired seeds
(`comparison.py`): validation loss at equal steps, and where the curve of its training loss is at equal bytes and at
equal time. No example is seen twice, so training loss is loss on new text. The optimizer is AdamW for all, as the
trainer has it.

All that the first seven do depends on the mean of the ranks' gradients alone (tests/compress hold it to 1e-10), so they
run on two ranks, with the same global batch; the last three, for which it matters how many there are, on four. Bytes
are those that a rank sends of four.

The runs are ordinary ones, `results/compress_convergence/<id>`, made one after another by rank processes that are kept
(`kept_ranks.py`), those that the targets are about first. The table is a record of its own beside them, and `--keep`
copies all of these records to benchmarks/records.
"""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import statistics
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import comparison
import convergence_table
import quality_table
from convergence_table import Times
from fresh_runs import Make, Words, nothing
from kept_ranks import Ranks
from llmsys import compose, schema
from llmsys.job import Record
from llmsys.track import jsonl

NAME = "compress_convergence"
RECORDS = Path(__file__).parent / "records"
GRID = (6.25e-5, 1.25e-4, 2.5e-4, 5e-4, 1e-3, 2e-3, 4e-3, 8e-3, 1.6e-2)
START = 1e-3
TUNING = (100,)
MARGIN = 0.02
"""Nats a token: how much worse ACP-SGD may be."""
R, DENSITY = 4, 0.001
BATCH = 8
"""Of the experiment: each rank has its share in one piece."""
WORLD = 4
"""For whom bytes are counted."""
FEWER = 2
"""On which the linear ones are trained."""
WINDOW = 10
"""Steps that are one point of a curve, but for the first ten, which are a point each."""


@dataclass(frozen=True, kw_only=True)
class Contestant:
    """A way to exchange gradients, on `world` ranks. `timed`: the method of compress_iteration that takes as long."""

    name: str
    overrides: Words
    world: int
    timed: str


ACP = ("compress=acpsgd", f"compress.r={R}")
LINEAR: dict[str, tuple[Words, str]] = {
    "ssgd": (("compress=none",), "none"),
    "powersgd": (("compress=powersgd", f"compress.r={R}"), "powersgd"),
    "acpsgd": (ACP, "acpsgd"),
    "acpsgd_2r": (("compress=acpsgd", f"compress.r={2 * R}"), "acpsgd_2r"),
    "randomk": (("compress=randomk", f"compress.density={WORLD * DENSITY:g}"), "randomk"),
    "acp_no_feedback": ((*ACP, "compress.error_feedback=false"), "acpsgd"),
    "acp_no_reuse": ((*ACP, "compress.reuse=false"), "acpsgd"),
}
OTHERS: dict[str, tuple[Words, str]] = {
    "topk": (("compress=topk", f"compress.density={DENSITY:g}"), "topk"),
    "efsign": (("compress=efsign",), "efsign"),
    "sign": (("compress=sign",), "sign"),
}
CONTESTANTS = {
    name: Contestant(name=name, overrides=words, world=world, timed=timed)
    for ways, world in ((LINEAR, FEWER), (OTHERS, WORLD))
    for name, (words, timed) in ways.items()
}
TARGETS = ("ssgd", "powersgd", "acpsgd", "acpsgd_2r")
GROUPS = (TARGETS, tuple(name for name in LINEAR if name not in TARGETS), tuple(OTHERS))
"""One after another: what the targets are about is there first."""


class Comparison(comparison.Comparison[Contestant]):
    """Some of the contestants."""

    def __init__(self, chosen: Sequence[Contestant], asked: argparse.Namespace) -> None:
        super().__init__(chosen, grid=GRID, tuning=TUNING, seeds=asked.seeds)
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
        return START

    def curve(self, contestant: Contestant) -> dict[str, list[float]]:
        """Training loss over steps, the mean over the paired seeds, as samples of the comparison's record."""
        folder = Path(self.asked.results) / NAME
        runs = [losses(folder / run.run_id) for run in self.by_seed(contestant).values()]
        means = [statistics.fmean(column) for column in zip(*runs, strict=True)]
        steps, points = points_of(means)
        return {"curve_steps": steps, "curve_loss": points}

    def config(self, contestant: Contestant) -> schema.Config:
        """Of its first run."""
        return schema.build(compose.compose(self.words(contestant, START, 0)))

    def bytes_per_step(self, contestant: Contestant) -> int:
        """That a rank of `WORLD` sends, on average over the steps, by the cost model."""
        import torch

        from llmsys.cost import traffic
        from llmsys.train.checks import facts

        config = self.config(contestant)
        train = dataclasses.replace(config.train, world=WORLD)
        known = facts(config, torch.device("cpu"))
        return sum(traffic.step_traffic(config.model, train, config.method, config.engine, **known).values())


def losses(folder: Path) -> list[float]:
    """Of each step of a run."""
    return [row["loss"] for row in jsonl.read(folder / "metrics.jsonl") if "loss" in row]


def points_of(values: Sequence[float]) -> tuple[list[float], list[float]]:
    """(steps, losses) of a curve of `values` by step, from 1: the first `WINDOW` as they are, then means of as many."""
    cuts = [(i, i + 1) for i in range(min(WINDOW, len(values)))]
    cuts += [(i, min(i + WINDOW, len(values))) for i in range(WINDOW, len(values), WINDOW)]
    return [(a + b + 1) / 2 for a, b in cuts], [round(statistics.fmean(values[a:b]), 5) for a, b in cuts]


def record(comparisons: Sequence[Comparison], asked: argparse.Namespace) -> Record:
    """What is there, as one record: numbers under `<contestant>/<what>`."""
    compared = [(group, each) for group in comparisons for each in group.contestants]
    config = {
        "grid": list(GRID),
        "tuning": list(TUNING),
        "seeds": asked.seeds,
        "margin": MARGIN,
        "world": WORLD,
        "steps": comparisons[0].config(compared[0][1]).train.steps,
        "overrides": asked.overrides,
        "contestants": {each.name: dataclasses.asdict(each) for _, each in compared},
    }
    summary: dict[str, float] = {}
    samples: dict[str, list[float]] = {}
    for group, each in compared:
        numbers, lists = group.numbers(each)
        numbers["bytes_per_step"] = group.bytes_per_step(each)
        summary |= {f"{each.name}/{what}": number for what, number in numbers.items()}
        samples |= {f"{each.name}/{what}": values for what, values in {**lists, **group.curve(each)}.items()}
    runs = [run for group in comparisons for run in group.records()]
    return comparison.record(NAME, config, runs, asked.threads, summary, samples)


def timed(whole: Record, times: Times) -> Record:
    """The comparison's record with `<contestant>/iteration_ms` of those whose method is in `times`."""
    contestants = whole.config["contestants"]
    found = {f"{name}/iteration_ms": times.ms.get(each["timed"]) for name, each in contestants.items()}
    summary = {**whole.summary, **{key: ms for key, ms in found.items() if ms is not None}}
    return dataclasses.replace(whole, summary=summary, config={**whole.config, "times": times.source})


def arguments(argv: Sequence[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--full", action="store_true", help="every contestant, and paired seeds")
    parser.add_argument("--contestants", nargs="+", choices=list(CONTESTANTS), help="default: four; with --full all")
    parser.add_argument("--seeds", type=int, help="paired seeds at the best rate (default: 5 with --full, else none)")
    parser.add_argument("--times", type=Path, help="the folder of a record of compress_iteration")
    parser.add_argument("--variant", help="of that record: its keys are <method>/<variant>/iteration_ms")
    comparison.options(parser)
    asked = parser.parse_args(argv)
    if (asked.times is None) != (asked.variant is None):
        parser.error("--times and --variant belong together")
    asked.contestants = asked.contestants or list(CONTESTANTS if asked.full else TARGETS)
    asked.seeds = (5 if asked.full else 0) if asked.seeds is None else asked.seeds
    return asked


def main(argv: Sequence[str], make: Make | None = None) -> Record:
    """Compares, writes the record, prints its table, and returns it; after Ctrl-C so of what is there, and exits."""
    asked = arguments(argv)
    times = convergence_table.times(asked.times, asked.variant) if asked.times else None
    comparisons, code = [], 0
    if asked.kept:
        whole = quality_table.newest(RECORDS / NAME)
    else:
        groups = [[CONTESTANTS[name] for name in group if name in asked.contestants] for group in GROUPS]
        comparisons = [Comparison(group, asked) for group in groups if group]
        code = _run(comparisons, asked, nothing if asked.show else make)
        whole = record(comparisons, asked)
    whole = timed(whole, times) if times else whole
    if not asked.kept:
        whole.leave(Path(asked.results))
    print(convergence_table.table(whole))
    if asked.keep:
        comparison.keep([whole, *(run for each in comparisons for run in each.records())], RECORDS)
    if code:
        sys.exit(code)
    return whole


def _run(comparisons: Sequence[Comparison], asked: argparse.Namespace, make: Make | None) -> int:
    """Has the runs made, a group after the other; the exit code."""
    there = sum(len(each.records()) for each in comparisons)
    expected = len(asked.contestants) * (comparison.RATES_EXPECTED + asked.seeds) - there
    code = 0
    with contextlib.closing(Ranks(max(expected, 0))) as ranks:
        for each in comparisons:
            try:
                each.run(make or ranks)
            except KeyboardInterrupt:
                return 130
            except RuntimeError:  # said already; the other groups go on
                code = 1
    return code


if __name__ == "__main__":
    main(sys.argv[1:])
