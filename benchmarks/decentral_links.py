"""Steps over lines that are as slow as they say, against what the simulator says of them.

    python benchmarks/decentral_links.py [--mbit 4,8] [--steps 8] [--out benchmarks/records]
    python benchmarks/decentral_links.py --mbit 4 --compress none,int8,adaptive --rounds 3

Three provider processes train `llama_6m` by the command that a user gives; each one's line out carries so many 10**6
bit/s, in its own process. What is compared is the median step with `predicted_step_ms` of the same record: the plan's
events one by one, from the tensors that cross its cuts. Nothing is copied meanwhile: the simulator knows no copies.
Codecs take turns, so that other work on the machine falls on all of them.
"""

from __future__ import annotations

import argparse
import itertools
import json
import os
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from llmsys.job import Record
from llmsys.table import piped
from script_record import RECORDS, Script

WORDS = (
    *("train.global_batch=8", "train.micro_batch=1", "train.length=64", "train.warmup_steps=2", "data.max_train=400"),
    *("data.max_val=1", "train.save_final=false", "task.faults=[]", "task.providers=3", "task.stages=3"),
    *("task.reserve=0", "task.copies=0", "task.owner_keeps=false", "task.emulate=true", "task.down_mbit=400"),
)


def ran(steps: int, *words: str) -> dict[str, Any]:
    """The record of a run of `WORDS` and these."""
    with tempfile.TemporaryDirectory() as folder:
        command = [sys.executable, "-m", "llmsys", "+exp=decentral_train", *WORDS, f"train.steps={steps}", *words]
        subprocess.run(command, env={**os.environ, "LLMSYS_RESULTS": folder}, check=True, stdout=subprocess.DEVNULL)
        (path,) = Path(folder).glob("*/*/record.json")
        found: dict[str, Any] = json.loads(path.read_text())
        return found


def show(record: Record) -> str:
    """One record as Markdown."""
    rows = []
    dense = dict[str, float]()
    for key, took in record.samples.items():
        where = key.removesuffix("/step_ms")
        mbit, _, codec = where.partition("/")
        median, predicted = statistics.median(took), record.summary[f"{where}/predicted_ms"]
        dense.setdefault(mbit, median)
        rows.append([mbit, codec or "none", f"{median:.0f}", f"{min(took):.0f} to {max(took):.0f}", f"{predicted:.0f}",
                     f"{100 * (median / predicted - 1):+.1f} %", f"{dense[mbit] / median:.2f}x"])  # fmt: skip
    head = ("line out", "codec", "step, ms", "least to most", "simulated", "off", "against the first")
    return "\n".join(piped(head, rows))


def main(given: Sequence[str]) -> Record:
    """Measures, writes the record, prints its table, and returns it."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--mbit", default="4,8")
    parser.add_argument("--compress", default="none")
    parser.add_argument("--rounds", type=int, default=1)
    parser.add_argument("--steps", type=int, default=8)
    parser.add_argument("--out", type=Path, default=RECORDS)
    asked = parser.parse_args(given)
    script = Script("decentral_links")
    summary, samples = dict[str, float](), dict[str, list[float]]()
    codecs = asked.compress.split(",")
    for _, mbit, codec in itertools.product(range(asked.rounds), map(float, asked.mbit.split(",")), codecs):
        record = ran(asked.steps, f"task.up_mbit={mbit}", f"task.compress={codec}")
        where = f"{mbit:g}mbit" + ("" if codec == "none" else f"/{codec}")
        samples.setdefault(f"{where}/step_ms", []).extend(record["samples"]["step_ms"])
        summary[f"{where}/step_ms"] = statistics.median(samples[f"{where}/step_ms"])
        for key in ("predicted_step_ms", "per_step_mib", "compressed"):
            summary[f"{where}/{key.replace('_step_ms', '_ms')}"] = record["summary"][key]
    config = {key: getattr(asked, key) for key in ("mbit", "compress", "rounds", "steps")} | {"words": list(WORDS)}
    name = f"{asked.mbit.replace(',', '-')}x{asked.steps}" + (f"-{'-'.join(codecs)}" if codecs != ["none"] else "")
    left = script.left(asked.out, name, config=config, summary=summary, samples=samples)
    print(show(left))
    return left


if __name__ == "__main__":
    main(sys.argv[1:])
