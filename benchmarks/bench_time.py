"""The predicted time of a step against the measured one, after calibrations on the spot, on cells it has not seen.

    python benchmarks/bench_time.py [--rounds 3] [--small] [--ranks 1,2] [--work DIR] [--out DIR] [KEY=VALUE]

For each number of ranks and in each round every cell is run as training in a fresh process (`+exp=bench_pretrain`), in
a shuffled order, and before every five of them `+exp=bench_calibrate` (operators, collectives, two whole cells; under a
minute). The cells are combinations of techniques, lengths, micro-batches and shapes; the two that were calibrated with
are not among them. On one rank they are eager and fused attention, recomputation, LoRA and LoRA-FA; on two ranks also
the engines.

A machine that others use too is faster in one minute than in the next: `spread` says how much the same cell varies. So
a cell's error is the median over the rounds of predicted / measured - 1, where the prediction is from the calibration
last before that run. `alone` is what somebody gets who calibrates once: every calibration against the median times.

    error    the mean of |that median| over the cells; `bias` their mean, `worst` the largest
    tau      Kendall's tau-b of the two orders of cells
    spread   the median over cells of (slowest round / fastest round - 1)

With `--work` the runs are kept there, and what is finished is not run again. It leaves
records/bench_time/<id>/record.json.
"""

from __future__ import annotations

import argparse
import json
import random
import statistics
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from subprocess import DEVNULL, run
from typing import Any

from llmsys import results, schema
from llmsys.bench.predict import machine as machines
from llmsys.bench.predict.prediction import predict
from llmsys.bench.report.quality import kendall
from llmsys.job import Record
from script_record import RECORDS, Script

Cell = tuple[str, list[str]]
EVERY = 5
"""Cells between two calibrations."""
SHORT = ["train.steps=10", "profile.warmup=3", "profile.probe=false", "data.num_examples=512"]
WORLDS = {1: ["engine=local", "train.world=1"], 2: ["train.world=2"]}
PLAIN = {1: [], 2: ["engine=ddp"]}
"""Where no letter chooses the engine."""


def cells(world: int) -> list[Cell]:
    """What is predicted and run: names and overrides."""
    found: list[Cell] = []

    def add(name: str, *words: str, length: int = 256, batch: int = 2) -> None:
        sizes = [f"train.length={length}", f"train.micro_batch={batch}", f"train.global_batch={batch * world}"]
        plain = [] if any("Z" in word or word.startswith("engine=") for word in words) else PLAIN[world]
        found.append((f"{name}, {batch} x {length}", [*WORLDS[world], *plain, *words, *sizes]))

    for letters in ("Naive", "R", "F", "F+R"):
        add(letters, f"techniques={letters}")
        add(letters, f"techniques={letters}", length=512, batch=1)
    if world == 1:
        for letters in ("L", "F+L", "F+R+L", "F+LFA"):
            add(letters, f"techniques={letters}", batch=4)
        add("F, 3 layers", "techniques=F", "model.num_layers=3", length=128, batch=8)
        add("F, 12 layers", "techniques=F", "model.num_layers=12", length=128, batch=1)
        add("F, width 512", "techniques=F", "model.hidden_size=512", "model.intermediate_size=1376", length=128)
        add("R, width 512", "techniques=R", "model.hidden_size=512", "model.intermediate_size=1376", length=128)
        add("F, vocabulary 8000", "techniques=F", "model.vocab_size=8000")
        add("F, length 1024", "techniques=F", length=1024, batch=1)
        add("Naive, length 1024", "techniques=Naive", length=1024, batch=1)
        sizes = ["train.micro_batch=1", "train.global_batch=4", "train.length=256"]
        found.append(("F, 4 times 1 x 256", [*WORLDS[1], "techniques=F", *sizes]))
        return found
    for letters in ("F+Z1", "F+Z2", "F+Z3", "F+R+Z3", "F+Z2+O", "F+Z3+O"):
        add(letters, f"techniques={letters}")
    add("fsdp2", "techniques=F+Z3", "engine=fsdp2")
    return found


def small(world: int) -> list[Cell]:
    """Three of them, tiny, to try the script."""
    tiny = ["model.num_layers=1", "train.length=32", "train.steps=3", "profile.warmup=1", "data.num_examples=24"]
    return [(name, [*words, *tiny]) for name, words in cells(world)[:6:2]]


def made(*words: str, folder: Path) -> Record:
    """The record of one `python -m llmsys`. RuntimeError where it ends badly."""
    ended = run([sys.executable, "-m", "llmsys", *words, f"results={folder}"], check=False, stdout=DEVNULL)
    if ended.returncode:
        raise RuntimeError(f"{' '.join(words)}: ended with {ended.returncode}")
    (record,) = results.read(folder)
    return record


def calibrated(world: int, folder: Path, words: Sequence[str]) -> dict[str, Any]:
    """The record of a calibration with so many ranks."""
    engine = [*WORLDS[world], *PLAIN[world], f"train.global_batch={4 * world}"]
    return dict(json.loads(made("+exp=bench_calibrate", *engine, *words, folder=folder).to_json()))


def predicted(record: Record, calibration: dict[str, Any]) -> dict[str, float]:
    """`step_ms` and ms by phase of the run that left `record`."""
    config = schema.build(record.config)
    found = predict(config, machines.calibrated(calibration, config))
    return {"step_ms": found.step_ms, **{f"{name}_ms": ms for name, ms in found.by_phase_ms.items()}}


def scores(rows: Sequence[dict[str, Any]]) -> dict[str, float]:
    """Of rows that have `rounds`, the measured ms of each round, `predicted`, what the calibration before each of them
    predicts, and `alone`, the ms that each calibration of all predicts."""
    ratios = [statistics.median(p / m for p, m in zip(row["predicted"], row["rounds"], strict=True)) for row in rows]
    medians = [statistics.median(row["rounds"]) for row in rows]
    errors = [100 * (ratio - 1) for ratio in ratios]
    alone = [
        statistics.mean(100 * abs(ms / median - 1) for ms, median in zip(each, medians, strict=True))
        for each in zip(*(row["alone"] for row in rows), strict=True)
    ]
    return {
        "cells": len(rows),
        "error_percent": statistics.mean(map(abs, errors)),
        "worst_percent": max(map(abs, errors)),
        "bias_percent": statistics.mean(errors),
        "tau": kendall((ratio * median, median) for ratio, median in zip(ratios, medians, strict=True)) or 0.0,
        "spread_percent": statistics.median(100 * (max(row["rounds"]) / min(row["rounds"]) - 1) for row in rows),
        "alone_error_percent": statistics.mean(alone),
        "alone_worst_percent": max(alone),
    }


def group(world: int, asked: argparse.Namespace, work: Path) -> list[dict[str, Any]]:
    """Calibrates, runs and predicts all cells of so many ranks."""
    chosen = small(world) if asked.small else cells(world)
    quick = ["task.most_s=0.005", "task.steps=2", "model=llama_tiny", "train.length=32"] if asked.small else []
    taken: dict[str, list[tuple[Record, int]]] = {name: [] for name, _ in chosen}
    calibrations: list[dict[str, Any]] = []
    seconds = []
    for number in range(asked.rounds):
        folder = work / f"{world}" / f"{number}"
        for turn, place in enumerate(random.Random(number).sample(range(len(chosen)), len(chosen))):
            if turn % EVERY == 0:
                begun, where = time.monotonic(), folder / f"calibration{turn // EVERY}"
                calibrations.append(calibrated(world, where, [*quick, *asked.overrides]))
                seconds.append(time.monotonic() - begun)
            name, words = chosen[place]
            words = ["+exp=bench_pretrain", *SHORT, *words, *asked.overrides]
            taken[name].append((made(*words, folder=folder / f"{place}"), len(calibrations) - 1))
    rows = []
    for name, runs in taken.items():
        records = [record for record, _ in runs]
        wanted = [predicted(records[0], calibration) for calibration in calibrations]
        rows.append(
            {
                "name": name,
                "world": world,
                "rounds": [record.summary["step_ms_p50"] for record in records],
                "predicted": [wanted[before]["step_ms"] for _, before in runs],
                "alone": [each["step_ms"] for each in wanted],
                "phases": {key: statistics.median(wanted[before][key] for _, before in runs) for key in wanted[0]},
                "records": records,
                "calibrated_s": max(seconds),
            }
        )
        last = rows[-1]
        middle, other = statistics.median(last["predicted"]), statistics.median(last["rounds"])
        print(f"{name}: {middle:.1f} for {other:.1f} ms", file=sys.stderr, flush=True)
    return rows


def show(record: Record) -> str:
    """One record as Markdown."""
    lines = [
        "| ranks | cells | mean error | worst | bias | Kendall's tau | spread | one calibration alone |",
        "|---:|---:|---:|---:|---:|---:|---:|---:|",
    ]
    for world in record.config["ranks"]:
        s = {key.partition("/")[2]: v for key, v in record.summary.items() if key.startswith(f"ranks_{world}/")}
        lines.append(
            f"| {world} | {s['cells']:.0f} | {s['error_percent']:.1f} % | {s['worst_percent']:.1f} % | "
            f"{s['bias_percent']:+.1f} % | {s['tau']:.2f} | {s['spread_percent']:.1f} % | "
            f"{s['alone_error_percent']:.1f} % |"
        )
    lines += ["", "| cell | ranks | measured ms | predicted | error |", "|---|---:|---:|---:|---:|"]
    samples = record.samples
    for (name, world), measured, wanted, error in zip(
        record.config["cells"], samples["measured_ms"], samples["predicted_ms"], samples["error_percent"], strict=True
    ):
        lines.append(f"| {name} | {world} | {measured:.1f} | {wanted:.1f} | {error:+.1f} % |")
    return "\n".join(lines)


def main(words: Sequence[str]) -> Record:
    """Runs everything, writes the record, prints its tables, and returns it."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--small", action="store_true", help="three tiny cells, to try the script")
    parser.add_argument("--ranks", default="1,2")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--work", type=Path, help="where runs are kept; else they are thrown away")
    parser.add_argument("--out", type=Path, default=RECORDS)
    parser.add_argument("overrides", nargs="*")
    asked = parser.parse_args(words)
    script = Script("bench_time")
    ranks = [int(each) for each in asked.ranks.split(",")]
    with tempfile.TemporaryDirectory() as name:
        rows = [row for world in ranks for row in group(world, asked, asked.work or Path(name))]
    summary: dict[str, float] = {}
    for world in ranks:
        own = [row for row in rows if row["world"] == world]
        summary |= {f"ranks_{world}/{key}": value for key, value in scores(own).items()}
        summary[f"ranks_{world}/calibration_s"] = own[0]["calibrated_s"]
    summary |= {"cells": len(rows)}
    example = rows[0]["records"][0]
    settings = {"cells": [[row["name"], row["world"]] for row in rows], "ranks": ranks, "overrides": asked.overrides}
    identity = [settings, asked.rounds, example.env.get("device_name")]
    phases = ("forward", "backward", "optimizer")
    record = script.left(
        asked.out,
        identity,
        config={**settings, "rounds": asked.rounds, "train": {"threads": example.config["train"]["threads"]}},
        env=example.env,
        summary=summary,
        samples={
            "measured_ms": [statistics.median(row["rounds"]) for row in rows],
            "predicted_ms": [statistics.median(row["predicted"]) for row in rows],
            "error_percent": [scores([row])["bias_percent"] for row in rows],
            **{f"round_{i}_ms": [row["rounds"][i] for row in rows] for i in range(asked.rounds)},
            **{f"predicted_{i}_ms": [row["predicted"][i] for row in rows] for i in range(asked.rounds)},
            **{f"measured_{p}_ms": [_median(row["records"], f"{p}_ms_p50") for row in rows] for p in phases},
            **{f"predicted_{p}_ms": [row["phases"][f"{p}_ms"] for row in rows] for p in phases},
        },
    )
    print(show(record))
    return record


def _median(records: Sequence[Record], key: str) -> float:
    return statistics.median(record.summary.get(key, 0.0) for record in records)


if __name__ == "__main__":
    main(sys.argv[1:])
