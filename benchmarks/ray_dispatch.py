"""What `dispatch=ray` costs a job over `dispatch=process`, and how soon a sweep is under way on several nodes.

    python benchmarks/ray_dispatch.py [--pairs 7] [--jobs 8] [--nodes 4] [--out benchmarks/records]

On a cluster of nodes that this machine emulates, warm: connected, and its nodes known. One job after another, in turns
by Ray and by a process of its own, each from its submission to its record; the overhead is the difference of a pair.
Then a sweep of short jobs by the command line, and when the last of them was under way.
"""

from __future__ import annotations

import argparse
import datetime
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path

from rich.console import Console

from llmsys import compose, dispatch, job, results
from llmsys.dispatch.cluster import ALONE
from llmsys.dispatch.show import Show
from llmsys.job import Record
from llmsys.table import piped
from script_record import RECORDS, Script

SHORT = ["train.steps=2", "train.length=32", "data.num_examples=8", "train.threads=1", "profile.warmup=0"]


def seconds(root: Path, place: str, seed: int) -> tuple[float, float]:
    """(from submission to record, of which the run itself) of one job."""
    words = [*SHORT, f"dispatch={place}", f"train.seed={seed}", f"results={root / place}"]
    made = job.make(compose.compose(words))
    begin = time.perf_counter()
    (record,) = dispatch.submit([made], Show(Console(file=open(os.devnull, "w"))))  # noqa: SIM115  as long as the process
    took = time.perf_counter() - begin
    assert record.status == "ok", record.error
    return took, record.seconds


def pairs(root: Path, address: str, count: int) -> dict[str, list[float]]:
    """Seconds of each job by either way; the first pair warms up and is left out."""
    from llmsys.dispatch import ray

    ray.connect(address, 1)
    found: dict[str, list[float]] = {"process_s": [], "ray_s": [], "process_run_s": [], "ray_run_s": []}
    for number in range(count + 1):
        for place in ("process", "ray") if number % 2 else ("ray", "process"):
            took, run = seconds(root, place, number)
            if number:
                found[f"{place}_s"].append(took)
                found[f"{place}_run_s"].append(run)
    ray.disconnect()
    return found


def sweep(root: Path, address: str, count: int) -> dict[str, float]:
    """Of a sweep: how many were recorded, by how many workers, and when the last was under way."""
    words = [*SHORT, "dispatch=ray", f"dispatch.address={address}", f"results={root / 'sweep'}"]
    seeds = "train.seed=" + ",".join(map(str, range(100, 100 + count)))
    begin = time.time()
    done = subprocess.run(
        [sys.executable, "-m", "llmsys", "-m", *words, seeds], capture_output=True, text=True, check=False
    )
    took = time.time() - begin
    assert done.returncode == 0, done.stderr
    made = results.read(root / "sweep")
    starts = [datetime.datetime.fromisoformat(each.started).timestamp() for each in made]
    return {
        "sweep/jobs": count,
        "sweep/recorded": sum(each.status == "ok" for each in made),
        "sweep/workers": len({pid for each in made for pid in each.env["dispatch"]["workers"]}),
        "sweep/last_started_s": max(starts) - begin + 1,  # the record says it in whole seconds
        "sweep/first_started_s": min(starts) - begin + 1,
        "sweep/seconds": took,
    }


def show(record: Record) -> str:
    """One record as Markdown."""
    s, samples = record.summary, record.samples
    rows = []
    for key in ("process_s", "ray_s", "overhead_s"):
        values = sorted(samples[key])
        rows.append([key, *(f"{value:.2f}" for value in (statistics.median(values), values[0], values[-1]))])
    lines = piped(("of a job, seconds", "median", "least", "most"), rows)
    rows = [[key.partition("/")[2], f"{s[key]:.4g}"] for key in s if key.startswith("sweep/")]
    return "\n".join([*lines, "", *piped(("of a sweep", ""), rows)])


def main(given: Sequence[str]) -> Record:
    """Measures, writes the record, prints its table, and returns it."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--pairs", type=int, default=7)
    parser.add_argument("--jobs", type=int, default=8)
    parser.add_argument("--nodes", type=int, default=4)
    parser.add_argument("--out", type=Path, default=RECORDS)
    asked = parser.parse_args(given)
    os.environ.update(ALONE)
    from ray.cluster_utils import Cluster

    script = Script("ray_dispatch")
    cluster = Cluster(initialize_head=True, head_node_args={"num_cpus": 2, "include_dashboard": False})
    with tempfile.TemporaryDirectory() as folder:
        try:
            for _ in range(asked.nodes - 1):
                cluster.add_node(num_cpus=2)
            cluster.wait_for_nodes()
            samples = pairs(Path(folder), cluster.address, asked.pairs)
            found = sweep(Path(folder), cluster.address, asked.jobs)
        finally:
            cluster.shutdown()
    samples["overhead_s"] = [ray - own for ray, own in zip(samples["ray_s"], samples["process_s"], strict=True)]
    medians = {key: statistics.median(values) for key, values in samples.items()}
    record = script.left(
        asked.out,
        f"{asked.nodes}x{asked.jobs}x{asked.pairs}",
        config={"jobs": asked.jobs, "nodes": asked.nodes, "pairs": asked.pairs, "settings": SHORT},
        summary=medians | found,
        samples=samples,
    )
    print(show(record))
    return record


if __name__ == "__main__":
    main(sys.argv[1:])
