"""What gradient compression withstands: ours, torch's own hook, and the package of Power-SGD's authors.

    python benchmarks/compress_robustness.py [--subjects acpsgd torch ...] [--cells "zero gradients" ...]
                                             [--deadline 45] [--out benchmarks/records] [--again]
    python benchmarks/compress_robustness.py --kept                   # the table of the committed record

A cell is a claim and one check of it for all (`robustness_cells.py`); each subject is behind a small adapter
(`robustness_subjects.py`). Every check runs in fresh processes on gloo over the loopback, with a deadline: a hang is a
result. What does not pass is run three times, and so is what passes where threads race. The whole grid takes an hour
beside other work: `--again` runs the named cells alone, whose claims have changed, and takes the others from the
committed record, with the time and the code of each.

epfml's package has to be installed from its repository: pip install --no-deps
git+https://github.com/epfml/powersgd@f07be92 (the wheels of powersgd 0.0.1 and 0.0.2 on PyPI hold no module). Where it
is missing the table says so.
"""

from __future__ import annotations

import argparse
import datetime
import hashlib
import json
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import robustness_cells as cells
import robustness_ranks as ranks
import robustness_subjects as subjects
import side_by_side
from llmsys.job import Record, code_hash

NAME = "compress_robustness"
REPEATS = 3
NOT_INSTALLED = "not installed"
Results = dict[str, dict[str, list[dict[str, Any]]]]
"""Cell -> subject -> outcomes."""


def measure(wanted: Sequence[str], of: Sequence[str], deadline_s: float) -> Results:
    found: Results = {}
    for cell in wanted:
        found[cell] = {}
        for subject in of:
            outcomes = repeated(cell, subject, deadline_s)
            found[cell][subject] = [outcome.plain() for outcome in outcomes]
            print(f"{cell} | {subject} | {said(found[cell][subject])} | {outcomes[0].what}", flush=True)
    return found


def repeated(cell: str, subject: str, deadline_s: float) -> list[ranks.Outcome]:
    if why := subjects.missing(subject):
        return [ranks.Outcome(NOT_INSTALLED, why)]
    outcomes: list[ranks.Outcome] = []
    while len(outcomes) < (cells.CELLS[cell].repeats if all(x.how == ranks.PASSES for x in outcomes) else REPEATS):
        with tempfile.TemporaryDirectory() as folder:
            outcomes.append(ranks.check(cell, subject, Path(folder), deadline_s))
    return outcomes


def said(outcomes: Sequence[dict[str, Any]]) -> str:
    """What stands in the table."""
    counts = Counter(outcome["how"] for outcome in outcomes)
    if set(counts) == {ranks.PASSES}:
        return "passes by hand" if outcomes[0].get("by_hand") else "passes"
    if set(counts) == {NOT_INSTALLED}:
        return NOT_INSTALLED
    return ", ".join(f"**{how}** {count} of {len(outcomes)}" for how, count in counts.items())


def table(record: Record) -> str:
    """As Markdown: the grid, what each cell claims, and what was seen where it does not hold."""
    results: Results = record.config["results"]
    of = record.config["subjects"]
    rows = [f"| | {' | '.join(of)} |", "|---" * (len(of) + 1) + "|"]
    rows += [f"| {cell} | {' | '.join(said(found[subject]) for subject in of)} |" for cell, found in results.items()]
    rows += ["", *(f"- {cell}: {record.config['claims'][cell]}" for cell in results), ""]
    for cell, found in results.items():
        for subject, outcomes in found.items():
            seen = [outcome.get("what") or outcome.get("by_hand") for outcome in outcomes]
            rows += [f"{subject}, {cell}: {text}" for text in dict.fromkeys(text for text in seen if text)]
    versions = [f"torch {record.env['packages']['torch']}", f"{record.env['cores']} cores", record.env["cpu"]]
    times: dict[str, list[str]] = {}
    for cell, at in record.config.get("ran", {}).items():
        times.setdefault(at["started"], []).append(cell)
    apart = [f"run at {started}: {', '.join(those)}" for started, those in times.items()] if len(times) > 1 else []
    return "\n".join([*rows, "", ", ".join(versions), *apart])


def record(
    asked: argparse.Namespace, results: Results, began: datetime.datetime, seconds: float, before: Record | None
) -> Record:
    """`before`: the record that has the cells which were not run now."""
    from llmsys.profile import environment

    env = environment.describe("cpu", 1)
    config: dict[str, Any] = {
        "subjects": list(asked.subjects),
        "claims": {name: cells.CELLS[name].claim for name in asked.cells},
        "deadline_s": asked.deadline,
        "epfml": subjects.EPFML,
    }
    started = began.isoformat(timespec="seconds")
    ran = {cell: {"started": started, "code_hash": code_hash()} for cell in asked.cells}
    if before is not None:
        as_one = {"started": before.started, "code_hash": before.code_hash}
        ran = {**before.config.get("ran", dict.fromkeys(before.config["results"], as_one)), **ran}
        config["claims"] = {**before.config["claims"], **config["claims"]}
        results = {**before.config["results"], **results}
    passed = {
        f"{subject}_passes": sum(all(x["how"] == ranks.PASSES for x in found[subject]) for found in results.values())
        for subject in asked.subjects
    }
    text = json.dumps([config, env["packages"], env["cpu"]], sort_keys=True)
    return Record(
        name=NAME,
        run_id=hashlib.sha256(text.encode()).hexdigest()[:12],
        task="benchmark",
        status="ok",
        config={**config, "ran": ran, "results": results},
        env=env,
        code_hash=code_hash(),
        started=started,
        seconds=round(seconds, 1),
        world=2,
        summary={"cells": float(len(results)), **passed},
    )


def kept() -> Record:
    """The committed record; of several the one with the most cells."""
    from llmsys import results

    return max(results.read(side_by_side.RECORDS / NAME), key=lambda each: each.summary["cells"])


def of_the_same(subjects: Sequence[str]) -> Record:
    """The committed record, to run some of its cells again. ValueError where the others would be no comparison."""
    from llmsys.profile import environment

    found, packages = kept(), environment.describe("cpu", 1)["packages"]
    if (found.config["subjects"], found.env["packages"]) != (list(subjects), packages):
        raise ValueError("--again: the kept record is of other subjects or of other versions of packages")
    return found


def main(words: Sequence[str]) -> Record:
    """Checks, writes the record, prints its table, and returns it."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--subjects", nargs="+", choices=list(subjects.SUBJECTS), default=list(subjects.SUBJECTS))
    parser.add_argument("--cells", nargs="+", choices=list(cells.CELLS), default=list(cells.CELLS))
    parser.add_argument("--deadline", type=float, default=45.0, help="seconds of a check, once its ranks are there")
    parser.add_argument("--out", type=Path, default=side_by_side.RECORDS)
    parser.add_argument("--kept", action="store_true", help="the table of the record in benchmarks/records")
    parser.add_argument("--again", action="store_true", help="the other cells are those of that record")
    asked = parser.parse_args(words)
    if asked.kept:
        found = kept()
    else:
        before = of_the_same(asked.subjects) if asked.again else None
        began, start = datetime.datetime.now(datetime.UTC), time.monotonic()
        grid = measure(asked.cells, asked.subjects, asked.deadline)
        found = record(asked, grid, began, time.monotonic() - start, before)
        found.leave(asked.out)
    print(table(found))
    return found


if __name__ == "__main__":
    main(sys.argv[1:])
