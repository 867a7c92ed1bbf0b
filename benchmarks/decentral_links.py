"""Steps over lines that are as slow as they say, against what the simulator says of them.

    python benchmarks/decentral_links.py [--mbit 4,8] [--steps 8] [--out benchmarks/records]

Three provider processes train `llama_6m` by the command that a user gives; each one's line out carries so many 10**6
bit/s, in its own process. What is compared is the median step with `predicted_step_ms` of the same record: the plan's
events one by one, from the tensors that cross its cuts. Nothing is copied meanwhile: the simulator knows no copies.
"""

from __future__ import annotations

import argparse
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


def ran(mbit: float, steps: int) -> dict[str, Any]:
    """The record of a run behind such lines."""
    with tempfile.TemporaryDirectory() as folder:
        words = [*WORDS, f"task.up_mbit={mbit}", f"train.steps={steps}"]
        command = [sys.executable, "-m", "llmsys", "+exp=decentral_train", *words]
        subprocess.run(command, env={**os.environ, "LLMSYS_RESULTS": folder}, check=True, stdout=subprocess.DEVNULL)
        (path,) = Path(folder).glob("*/*/record.json")
        found: dict[str, Any] = json.loads(path.read_text())
        return found


def show(record: Record) -> str:
    """One record as Markdown."""
    rows = []
    for key, took in record.samples.items():
        mbit, predicted = key.partition("/")[0], record.summary[f"{key.partition('/')[0]}/predicted_ms"]
        median = statistics.median(took)
        rows.append([mbit, f"{median:.0f}", f"{min(took):.0f} to {max(took):.0f}", f"{predicted:.0f}",
                     f"{100 * (median / predicted - 1):+.1f} %"])  # fmt: skip
    return "\n".join(piped(("line out", "step, ms", "least to most", "simulated", "off"), rows))


def main(given: Sequence[str]) -> Record:
    """Measures, writes the record, prints its table, and returns it."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--mbit", default="4,8")
    parser.add_argument("--steps", type=int, default=8)
    parser.add_argument("--out", type=Path, default=RECORDS)
    asked = parser.parse_args(given)
    script = Script("decentral_links")
    summary, samples = dict[str, float](), dict[str, list[float]]()
    for mbit in map(float, asked.mbit.split(",")):
        record, where = ran(mbit, asked.steps), f"{mbit:g}mbit"
        samples[f"{where}/step_ms"] = record["samples"]["step_ms"]
        summary[f"{where}/step_ms"] = record["summary"]["step_ms_p50"]
        summary[f"{where}/predicted_ms"] = record["summary"]["predicted_step_ms"]
    config = {"mbit": asked.mbit, "steps": asked.steps, "words": list(WORDS)}
    name = f"{asked.mbit.replace(',', '-')}x{asked.steps}"
    left = script.left(asked.out, name, config=config, summary=summary, samples=samples)
    print(show(left))
    return left


if __name__ == "__main__":
    main(sys.argv[1:])
