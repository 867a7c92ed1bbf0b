"""What changes to a step are predicted to save, before they are made, against what they save.

    python benchmarks/bench_opportunities.py [--rounds 20] [--work DIR] [--out DIR] [KEY=VALUE]

Each case is a run of `+exp=bench_opportunities task.verify=true` in a fresh process. It takes a step apart into
modules, and times what would come in the place of some of them alone, at the model's own shapes
(`bench.opportunities.changes`): the predicted saving is the difference. And it makes the change: the real saving is the
difference between steps with it and without it. All four take turns, and medians over rounds count. The changes are
fused attention in place of eager, a loss over some rows of the logits at a time, and RMSNorm as one call of torch's.

A prediction can be told to be right or wrong where what is really saved is known as well as it has to be right: its
95 % interval (a bootstrap of the median over pairs of steps) is within `BOUND` percent of it. Others are shown with
their intervals and not scored. It leaves records/bench_opportunities_check/<id>/record.json.
"""

from __future__ import annotations

import argparse
import contextlib
import math
import statistics
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path

from llmsys import compose, dispatch, job, runner
from llmsys.dispatch.show import Show
from llmsys.job import Record
from script_record import RECORDS, Script
from side_by_side import median_interval

BOUND = 15.0
"""Percent that a predicted saving may be off."""
CASES = {
    "4 x 512": ["train.length=512", "train.micro_batch=4", "train.global_batch=4"],
    "2 x 1024": ["train.length=1024", "train.micro_batch=2", "train.global_batch=2"],
    "1 x 2048": ["train.length=2048", "train.micro_batch=1", "train.global_batch=1", "model.max_length=2048"],
    "2 x 1024, R": ["train.length=1024", "train.micro_batch=2", "train.global_batch=2", "train.recompute=block"],
    "8 x 256, vocabulary 8000": ["train.micro_batch=8", "train.global_batch=8", "model.vocab_size=8000"],
}
"""Of `llama_6m`, eager, in fp32 on a CPU; overrides given beside them win."""


def measured(name: str, asked: argparse.Namespace) -> Record:
    """The record of a case. RuntimeError where it did not end well."""
    words = ["+exp=bench_opportunities", "task.verify=true", f"task.rounds={asked.rounds}", *CASES[name]]
    with contextlib.nullcontext(asked.work) if asked.work else tempfile.TemporaryDirectory() as folder:
        inline = ["dispatch=inline"] if asked.inline else []
        made = job.make(compose.compose([*words, *asked.overrides, *inline, f"results={folder}"]))
        record = runner.run(made) if asked.inline else next(iter(dispatch.submit([made], Show())))
    if record.status != "ok":
        raise RuntimeError(f"{name}: ended as {record.status} ({record.reason}): {record.error}")
    return record


def changes(record: Record) -> dict[str, dict[str, float]]:
    """Change -> `gone_ms`, `comes_ms`, `saves_ms` (predicted), `saved_ms` (measured) with its interval, `least_ms` and
    `most_ms`, and `saved_percent` of the step. Without `off_percent`, which small ones have not: `off`."""
    found: dict[str, dict[str, float]] = {}
    for key, value in record.summary.items():
        if key.startswith("changes/"):
            _, name, what = key.split("/")
            found.setdefault(name, {})[what] = value
    for name, own in found.items():
        without, with_it = (record.samples[f"changes/{name}/{which}_step_ms"] for which in ("without", "with"))
        saved = [before - after for before, after in zip(without, with_it, strict=True)]
        own["least_ms"], own["saved_ms"], own["most_ms"] = median_interval(saved)
        own["saved_percent"] = 100 * own["saved_ms"] / statistics.median(without)
        own.pop("off_percent", None)
    return found


def known_to(own: dict[str, float]) -> float:
    """Percent of what is saved to which that is known: the wider side of its interval."""
    saved = own["saved_ms"]
    return 100 * max(own["most_ms"] - saved, saved - own["least_ms"]) / abs(saved) if saved else math.inf


def off(own: dict[str, float]) -> float:
    """Percent by which a prediction is off."""
    return 100 * (own["saves_ms"] / own["saved_ms"] - 1)


def scores(rows: Sequence[dict[str, float]]) -> dict[str, float]:
    """Of changes that can be told: how far off the predictions are. Of none only how many there are."""
    telling = [row for row in rows if known_to(row) <= BOUND]
    found = {"changes": float(len(rows)), "changes_that_can_be_told": float(len(telling))}
    if telling:
        errors = [abs(off(row)) for row in telling]
        found |= {"mean_off_percent": statistics.fmean(errors), "worst_off_percent": max(errors)}
        found["within_bound"] = float(sum(each <= BOUND for each in errors))
    return found


def show(record: Record) -> str:
    """One record as Markdown."""
    heads = ["case", "change", "predicted ms", "saved ms", "95 %", "% of the step", "off by %"]
    lines = ["| " + " | ".join(heads) + " |", "|---|---|---:|---:|---:|---:|---:|"]
    for at, (case, change) in enumerate(record.config["changes"]):
        own = {key: values[at] for key, values in record.samples.items()}
        error = f"{off(own):+.1f}" if known_to(own) <= BOUND else "cannot be told"
        interval = f"{own['least_ms']:.1f} to {own['most_ms']:.1f}"
        cells = [f"{own['saves_ms']:.1f}", f"{own['saved_ms']:.1f}", interval, f"{own['saved_percent']:.1f}", error]
        lines.append(f"| {case} | {change} | {' | '.join(cells)} |")
    s = record.summary
    if "worst_off_percent" in s:
        within = f"{s['within_bound']:.0f} of {s['changes_that_can_be_told']:.0f} predictions within {BOUND:g} %"
        errors = f"{s['mean_off_percent']:.1f} % off on average, {s['worst_off_percent']:.1f} % at most"
        lines += ["", f"{within}, {errors}."]
    return "\n".join(lines)


def main(given: Sequence[str]) -> Record:
    """Runs all cases, writes the record, prints its table, and returns it."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=20)
    parser.add_argument("--cases", type=lambda text: text.split(";"), default=list(CASES))
    parser.add_argument("--work", help="where runs are kept; else they are thrown away")
    parser.add_argument("--inline", action="store_true", help="in this process, to try the script")
    parser.add_argument("--out", type=Path, default=RECORDS)
    parser.add_argument("overrides", nargs="*")
    asked = parser.parse_args(given)
    script = Script("bench_opportunities_check")
    records = {name: measured(name, asked) for name in asked.cases}
    rows = [((case, name), own) for case, record in records.items() for name, own in changes(record).items()]
    example = next(iter(records.values()))
    identity = [asked.cases, asked.overrides, asked.rounds, example.env.get("device_name")]
    keys = sorted(set.intersection(*({*own} for _, own in rows)))
    record = script.left(
        asked.out,
        identity,
        config={
            "changes": [[*name] for name, _ in rows],
            "rounds": asked.rounds,
            "overrides": asked.overrides,
            "train": {"threads": example.config["train"]["threads"]},
        },
        env=example.env,
        summary=scores([own for _, own in rows]),
        samples={key: [own[key] for _, own in rows] for key in keys},
    )
    print(show(record))
    return record


if __name__ == "__main__":
    main(sys.argv[1:])
