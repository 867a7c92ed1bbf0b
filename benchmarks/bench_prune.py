"""A pruned sweep against the exhaustive one: the same cells that run, the same best ones, in how much of the time.

    python benchmarks/bench_prune.py [--batches 1,2,...] [--lengths 256,...] [--memory-gib 1.2] [--out DIR] [KEY=VALUE]

Both are `python -m llmsys -m +exp=bench_pretrain` over micro-batches x lengths x recomputation, on one rank, really run
and really out of memory: `dispatch.memory_gib` is the limit, and `force=true`, so that no estimate refuses a cell.
The exhaustive one makes every run. The pruned one begins with what is predicted to need least, and leaves out what
needs at least as much as a run that was seen to run out. The lists of batches and lengths are those that the paper's
authors sweep with their toolkit (github.com/AaronZLT/llm-toolkit, e2e-benchmark/run.sh).

Cells are compared within a length. Best are those that no other beats both ways: in tokens a second and in batch size,
or in tokens a second and in memory (`accounted_bytes`). Each sweep measures speed for itself, and two cells that lie
closer than its noise may change places; so the set is taken of one measurement, the exhaustive sweep's: of its best
cells, how many the pruned sweep ran too (`front_kept`). How many are best by both sweeps' own numbers is beside it
(`front_agreed`), which is 100 % on a quiet machine only.

It leaves records/bench_prune/<id>/record.json with the seconds of every run of both.
"""

from __future__ import annotations

import argparse
import hashlib
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from subprocess import DEVNULL, run

from llmsys import results
from llmsys.job import HARMLESS, Record, code_hash

RECORDS = Path(__file__).parent / "records"
BATCHES, LENGTHS = "1,2,4,8,16,32,64,96,128,160,192,224,256", "256,512,1024,2048,4096"
SETTINGS = ("+exp=bench_pretrain", "engine=local", "train.world=1", "model.max_length=4096", "force=true")
SHORT = ("train.steps=3", "profile.warmup=1", "data.num_examples=512")
SWEEPS = {
    "exhaustive": ("sweep.order=listed", "sweep.prune=false"),
    "pruned": ("sweep.order=predicted", "sweep.prune=true"),
}
Cell = tuple[int, int, str]
"""(length, micro-batch, what is computed again)"""


def cell(record: Record) -> Cell:
    train = record.config["train"]
    return train["length"], train["micro_batch"], train["recompute"]


def front(records: Sequence[Record]) -> set[Cell]:
    """The best cells: within each length those that none beats in (tokens/s, batch), or in (tokens/s, memory)."""
    ran = [record for record in records if record.status == "ok"]
    found: set[Cell] = set()
    for length in {cell(record)[0] for record in ran}:
        alike = [record for record in ran if cell(record)[0] == length]
        for second in (_batch, _memory):
            points = {cell(record): (record.summary["tokens_per_s"], second(record)) for record in alike}
            found |= {place for place, point in points.items() if not any(_beats(q, point) for q in points.values())}
    return found


def _batch(record: Record) -> float:
    return float(cell(record)[1])


def _memory(record: Record) -> float:
    return -record.summary["accounted_bytes"]


def _beats(one: tuple[float, float], other: tuple[float, float]) -> bool:
    return one != other and one[0] >= other[0] and one[1] >= other[1]


def compare(exhaustive: Sequence[Record], pruned: Sequence[Record], seconds: dict[str, float]) -> dict[str, float]:
    """The summary of both sweeps; `seconds`: wall time of each."""
    best, own = front(exhaustive), front(pruned)
    fits = [{cell(record) for record in side if record.status == "ok"} for side in (exhaustive, pruned)]
    ran = [sum(record.status != "skipped" for record in side) for side in (exhaustive, pruned)]
    return {
        **{f"{name}_s": round(value, 1) for name, value in seconds.items()},
        "time_percent": round(100 * seconds["pruned"] / seconds["exhaustive"], 1),
        "cells": len(exhaustive),
        "fit": len(fits[0]),
        "fit_in_one_only": len(fits[0] ^ fits[1]),
        "runs_exhaustive": ran[0],
        "runs_pruned": ran[1],
        "front": len(best),
        "front_kept": len(best & fits[1]),
        "front_agreed": len(best & own),
    }


def show(record: Record) -> str:
    """One record as Markdown."""
    s = record.summary
    rows = [
        "| sweep | runs | time s | cells that fit | best cells |",
        "|---|---:|---:|---:|---:|",
        f"| exhaustive | {s['runs_exhaustive']:.0f} | {s['exhaustive_s']:,.0f} | {s['fit']:.0f} | {s['front']:.0f} |",
        f"| pruned | {s['runs_pruned']:.0f} | {s['pruned_s']:,.0f} | "
        f"{'the same' if not s['fit_in_one_only'] else 'others'} | {s['front_kept']:.0f} of {s['front']:.0f} |",
        "",
        f"{s['time_percent']:.0f} % of the time; {s['front_agreed']:.0f} of {s['front']:.0f} are best by both sweeps' "
        "own measurements.",
    ]
    return "\n".join(rows)


def main(words: Sequence[str]) -> Record:
    """Runs both sweeps, writes the record, prints its table, and returns it. RuntimeError for a run that broke."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--batches", default=BATCHES)
    parser.add_argument("--lengths", default=LENGTHS)
    parser.add_argument("--recompute", default="none,block")
    parser.add_argument("--memory-gib", type=float, default=1.2)
    parser.add_argument("--out", type=Path, default=RECORDS)
    parser.add_argument("overrides", nargs="*")
    asked = parser.parse_args(words)
    axes = (f"train.micro_batch={asked.batches}", f"train.length={asked.lengths}", f"train.recompute={asked.recompute}")
    common = (*SETTINGS, *SHORT, f"dispatch.memory_gib={asked.memory_gib}", *axes, *asked.overrides)
    made: dict[str, list[Record]] = {}
    seconds: dict[str, float] = {}
    for name, sweep in SWEEPS.items():
        with tempfile.TemporaryDirectory() as folder:
            command = [sys.executable, "-m", "llmsys", "-m", *common, *sweep, f"results={folder}"]
            start = time.monotonic()
            run(command, check=False, stdout=DEVNULL)
            seconds[name] = time.monotonic() - start
            made[name] = results.read(folder)
    broken = [record for side in made.values() for record in side if record.status not in HARMLESS]
    if broken:
        raise RuntimeError(f"{cell(broken[0])}: ended as {broken[0].status} ({broken[0].reason}): {broken[0].error}")
    example = made["exhaustive"][0]
    text = " ".join((*common, str(example.env.get("device_name"))))
    record = Record(
        name="bench_prune",
        run_id=hashlib.sha256(text.encode()).hexdigest()[:12],
        task="benchmark",
        status="ok",
        config={"command": list(common), "train": {"threads": example.config["train"]["threads"]}},
        env=example.env,
        code_hash=code_hash(),
        started=min(each.started for each in made["exhaustive"]),
        seconds=round(sum(seconds.values()), 1),
        summary=compare(made["exhaustive"], made["pruned"], seconds),
        samples={f"{name}_run_s": [each.seconds for each in side] for name, side in made.items()},
    )
    record.leave(asked.out)
    print(show(record))
    return record


if __name__ == "__main__":
    main(sys.argv[1:])
