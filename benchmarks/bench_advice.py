"""Advice under a memory cap against a measured sweep: how much slower is what it recommends than the best that fits?

    python benchmarks/bench_advice.py [--ranks 2] [--repeats 1] [--batches 1,2,4,8] [--letters F,R,Z2,Z3]
                                      [--work DIR] [--out DIR] [KEY=VALUE]

Every combination of the letters at every micro-batch is really run (`+exp=bench_pretrain`, a fresh process each, in a
shuffled order), and its memory measured: on a GPU the allocator's peak, on a CPU the most bytes alive in a step
(`live_steps`). Then, for a memory of 30, 50 and 70 % of what Naive takes at the largest micro-batch, `bench_advise` is
asked which to choose. It knows the machine by `bench_calibrate` alone, and none of the sweep's runs.

    regret    1 - tokens/s of its choice / tokens/s of the fastest cell whose measured memory fits; 100 % where the
              choice itself does not fit

With `--repeats N` each cell is run N times and its median counts. It leaves records/bench_advice/<id>/record.json.
"""

from __future__ import annotations

import argparse
import random
import statistics
import sys
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from llmsys import compose, job, results, runner
from llmsys.bench.techniques import NAIVE, Techniques
from llmsys.job import Record
from script_record import RECORDS, Script

CAPS = (30, 50, 70)
"""Percent of the memory that Naive takes."""
BOUND = 5.0
"""Percent of regret, at most."""
SHORT = ("train.steps=10", "profile.warmup=3", "data.num_examples=512", "force=true")
GIB = 2**30
Key = tuple[str, int]
"""(techniques, micro-batch)"""


@dataclass(frozen=True)
class Measured:
    """A cell of the sweep: tokens a second of all ranks, and bytes of the fullest rank."""

    tokens_per_s: float
    peak_bytes: float


def regret(cells: Mapping[Key, Measured], room: float, choice: Key | None) -> dict[str, float]:
    """`regret_percent` of `choice` (None: nothing fits, it says) under `room` bytes a rank, `fits`: whether it does,
    and tokens a second of it and of the best. ValueError where the sweep lacks the choice; nothing is regretted where
    nothing fits and that was said."""
    fitting = {key: each.tokens_per_s for key, each in cells.items() if each.peak_bytes <= room}
    best = max(fitting.values(), default=0.0)
    found = {"cells_that_fit": float(len(fitting)), "best_tokens_per_s": best}
    if choice is None:
        return {**found, "fits": float(not fitting), "tokens_per_s": 0.0, "regret_percent": 100.0 * bool(fitting)}
    if choice not in cells:
        raise ValueError(f"{choice[0]} at micro-batch {choice[1]}: was chosen, and is no cell of the sweep")
    own = fitting.get(choice, 0.0)
    regretted = 100 * (1 - own / best) if best else 100.0
    return {**found, "fits": float(choice in fitting), "tokens_per_s": own, "regret_percent": regretted}


def sweep(asked: argparse.Namespace, folder: Path) -> tuple[dict[Key, Measured], Record]:
    """Every cell, and the record of one of them. RuntimeError for a run that broke."""
    keys = [(str(each), size) for each in Techniques.combinations(asked.letters) for size in asked.batches]
    taken: dict[Key, list[Record]] = {key: [] for key in keys}
    for repeat in range(asked.repeats):
        random.Random(repeat).shuffle(keys)
        for number, key in enumerate(keys, 1):
            results_in = f"results={folder / 'sweep' / str(repeat)}"
            record = made([*words(asked, key), results_in], asked.inline)
            taken[key].append(record)
            said = f"{record.summary['tokens_per_s']:,.0f} tokens/s"
            print(f"[{number}/{len(keys)}] {key[0]}, {key[1]}: {said}", file=sys.stderr, flush=True)
    memory = Memory(asked.ranks)
    cells = {}
    for key, records in taken.items():
        speed = statistics.median(record.summary["tokens_per_s"] for record in records)
        cells[key] = Measured(speed, max(memory(record) for record in records[:1]))
    return cells, taken[keys[0]][0]


def words(asked: argparse.Namespace, key: Key) -> list[str]:
    """The command line of a cell."""
    engine = ["engine=ddp" if asked.ranks > 1 else "engine=local"] if "Z" not in key[0] and "TP" not in key[0] else []
    sizes = [f"train.world={asked.ranks}", f"train.micro_batch={key[1]}", f"train.global_batch={asked.ranks * key[1]}"]
    return ["+exp=bench_pretrain", *SHORT, f"techniques={key[0]}", *engine, *sizes, *asked.overrides]


def made(overrides: Sequence[str], inline: bool) -> Record:
    """One run, in a fresh process unless `inline`. RuntimeError where it did not end well."""
    from llmsys import dispatch
    from llmsys.dispatch.show import Show

    made = job.make(compose.compose([*overrides, *(["dispatch=inline"] if inline else [])]))
    record = runner.run(made) if inline else next(iter(dispatch.submit([made], Show())))
    if record.status != "ok":
        raise RuntimeError(f"{' '.join(overrides)}: ended as {record.status} ({record.reason}): {record.error}")
    return record


class Memory:
    """Bytes of the fullest rank in a step of the run that left a record."""

    def __init__(self, ranks: int) -> None:
        self._ranks: Any = None
        self._alone = ranks == 1

    def __call__(self, record: Record) -> float:
        if "peak_gib" in record.summary:
            return record.summary["peak_gib"] * GIB
        import bench_memory
        import live_steps
        from llmsys.comm.place import Place

        if self._alone:
            return float(live_steps.measured(Place(), record.config)["peak"])
        self._ranks = self._ranks or bench_memory.Ranks()
        return float(self._ranks(record.config)["peak"])


def calibrated(asked: argparse.Namespace, folder: Path) -> Path:
    """The folder of a calibration with so many ranks."""
    engine = ["engine=ddp" if asked.ranks > 1 else "engine=local", f"train.world={asked.ranks}"]
    sizes = [f"train.global_batch={asked.ranks * 4}", *asked.calibration]
    own = ["+exp=bench_calibrate", *engine, *sizes, *asked.overrides, f"results={folder / 'calibration'}"]
    record = made(own, asked.inline and asked.ranks == 1)
    return folder / "calibration" / record.name / record.run_id


def advised(asked: argparse.Namespace, folder: Path, speeds: Path, room: float) -> tuple[Key | None, Record]:
    """What `bench_advise` chooses for `room` bytes a rank. A CPU's ranks share its memory."""
    cuda = "hardware.device=cuda" in asked.overrides
    gib = room / GIB * (1 if cuda else asked.ranks)
    own = ["+exp=bench_advise", "hardware=auto", "model.dtype=fp32"]
    if not any(word.startswith("model=") for word in asked.overrides):
        own.append("model=llama_6m")
    own += ["train.precision=fp32", f"task.speeds={speeds}", f"hardware.mem_gib={gib!r}", f"train.world={asked.ranks}"]
    own += [f"hardware.devices={asked.ranks}"]
    own += [f"task.letters=[{','.join(asked.letters)}]", f"task.micro_batches=[{','.join(map(str, asked.batches))}]"]
    record = made([*own, *asked.overrides, f"results={folder / 'advice'}"], inline=True)
    choice = (record.notes["choice"], round(record.summary["micro_batch"]))
    return (choice if record.summary["fits"] else None), record


def show(record: Record) -> str:
    """One record as Markdown."""
    lines = ["| memory, % of Naive's | choice | tokens/s | best that fits | cells that fit | regret % |"]
    lines.append("|---:|---|---:|---:|---:|---:|")
    for cap in CAPS:
        s = {key.partition("/")[2]: v for key, v in record.summary.items() if key.startswith(f"{cap}/")}
        own = f"{s['tokens_per_s']:,.0f}" if s["fits"] else "does not fit"
        lines.append(
            f"| {cap} | {record.notes[f'{cap}/choice']} | {own} | {s['best_tokens_per_s']:,.0f}, "
            f"{record.notes[f'{cap}/best']} | {s['cells_that_fit']:.0f} | {s['regret_percent']:.1f} |"
        )
    worst = record.summary["worst_regret_percent"]
    reached = "reached" if worst <= BOUND else "not reached"
    cells = f"{record.summary['cells']:.0f} cells"
    return "\n".join([*lines, "", f"Worst regret {worst:.1f} %, at most {BOUND:g} %: {reached}. {cells}."])


def scored(
    cells: Mapping[Key, Measured], choices: Mapping[int, Key | None], rooms: Mapping[int, float]
) -> tuple[dict[str, float], dict[str, str]]:
    """(summary, notes) by cap."""
    summary: dict[str, float] = {"cells": len(cells)}
    notes: dict[str, str] = {}
    for cap, room in rooms.items():
        choice = choices[cap]
        summary |= {f"{cap}/{key}": value for key, value in regret(cells, room, choice).items()}
        fitting = [key for key, each in cells.items() if each.peak_bytes <= room]
        best = max(fitting, key=lambda key: cells[key].tokens_per_s, default=None)
        for name, key in (("choice", choice), ("best", best)):
            notes[f"{cap}/{name}"] = f"{key[0]}, {key[1]}" if key else "nothing"
    summary["worst_regret_percent"] = max(summary[f"{cap}/regret_percent"] for cap in rooms)
    return summary, notes


def main(given: Sequence[str]) -> Record:
    """Sweeps, asks, writes the record, prints its table, and returns it. RuntimeError for a run that broke."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--ranks", type=int, default=2)
    parser.add_argument("--batches", type=lambda text: [int(each) for each in text.split(",")], default=[1, 2, 4, 8])
    parser.add_argument("--letters", type=lambda text: text.split(","), default=["F", "R", "Z2", "Z3"])
    parser.add_argument("--repeats", type=int, default=1)
    parser.add_argument("--calibration", nargs="*", default=[], help="settings of the calibration alone: KEY=VALUE")
    parser.add_argument("--work", type=Path, help="where runs are kept; else they are thrown away")
    parser.add_argument("--inline", action="store_true", help="runs of one rank in this process, to try the script")
    parser.add_argument("--out", type=Path, default=RECORDS)
    parser.add_argument("overrides", nargs="*")
    asked = parser.parse_args(given)
    script = Script("bench_advice")
    with tempfile.TemporaryDirectory() as name:
        folder = asked.work or Path(name)
        speeds = calibrated(asked, folder)
        cells, example = sweep(asked, folder)
        naive = cells[NAIVE, max(asked.batches)].peak_bytes
        rooms = {cap: naive * cap / 100 for cap in CAPS}
        choices = {cap: advised(asked, folder, speeds, room)[0] for cap, room in rooms.items()}
        assert not [each for each in results.read(folder / "advice") if each.summary["measured_combinations"]]
    summary, notes = scored(cells, choices, rooms)
    settings = {"letters": asked.letters, "batches": asked.batches, "ranks": asked.ranks, "overrides": asked.overrides}
    identity = [settings, asked.repeats, example.env.get("device_name")]
    record = script.left(
        asked.out,
        identity,
        config={
            **settings,
            "cells": [[*key] for key in cells],
            "repeats": asked.repeats,
            "train": {"threads": example.config["train"]["threads"]},
        },
        env=example.env,
        summary={**summary, "naive_peak_bytes": naive},
        samples={
            "tokens_per_s": [each.tokens_per_s for each in cells.values()],
            "peak_bytes": [each.peak_bytes for each in cells.values()],
        },
        notes=notes,
    )
    print(show(record))
    return record


if __name__ == "__main__":
    main(sys.argv[1:])
