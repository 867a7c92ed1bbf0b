"""Loads of engines, predicted from passes of the model and one other load of each engine.

    python benchmarks/bench_served.py [--python VENV/bin/python] [--servers static,transformers] [--known 8]
        [--unseen 4,16] [--rounds 3] [--out FOLDER] [WORD ...]

By the commands that a user gives. `bench_serve_modules` times passes. In each round each engine serves a load with
`--known` requests under way, which says how many times as long passes take in it (`llmsys.bench.serve.slower`), and
loads with as many as `--unseen` says, which are predicted with that (`task.served`). They follow each other, so that
other work on the machine falls on all of them; quoted is the median over the rounds of how far a prediction is off.
`--python`: the interpreter of vLLM's virtual environment, with which `vllm_cpu` is one of the engines. WORDs are
settings of every run.
"""

from __future__ import annotations

import argparse
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path

from llmsys.job import Record
from llmsys.table import piped
from script_record import RECORDS, Script

FIGURES = {"output_tokens_per_s": "tokens out/s", "tpot_ms_p50": "per token p50", "ttft_ms_p50": "first token p50",
           "e2e_ms_p50": "whole request p50"}  # fmt: skip


def show(record: Record) -> str:
    """One record as Markdown."""
    rows = []
    for load in dict.fromkeys(key.rpartition("/")[0] for key in record.samples if key.count("/") == 2):
        server, _, under_way = load.partition("/")
        cells = [_spread(record.samples[f"{load}/{key}"], "+.1f", " %") for key in FIGURES]
        rows.append([server, under_way, _spread(record.samples[f"{server}/slower"], ".2f", ""), *cells])
    means = (f"{record.summary[f'{key}_error_percent']:.1f} %" for key in FIGURES)
    rows.append(["mean of the medians, of either sign", "", "", *means])
    heads = ("engine", "under way", "passes take x times as long", *(f"{each}: off" for each in FIGURES.values()))
    return "\n".join(piped(heads, rows))


def _spread(values: Sequence[float], digits: str, unit: str) -> str:
    return f"{statistics.median(values):{digits}}{unit} ({min(values):{digits}} to {max(values):{digits}})"


def ran(results: Path, exp: str, *words: str) -> tuple[Path, Record]:
    """The folder and the record of a run."""
    before = set(results.glob(f"{exp}/*/record.json"))
    command = [sys.executable, "-m", "llmsys", f"+exp={exp}", f"results={results}", *words]
    subprocess.run(command, check=True, stdout=subprocess.DEVNULL)
    (path,) = set(results.glob(f"{exp}/*/record.json")) - before
    record = Record.read(path.parent)
    assert record is not None
    return path.parent, record


def main(given: Sequence[str]) -> Record:
    """Measures, writes the record, prints its table, and returns it."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--python", default="")
    parser.add_argument("--servers", default="static,transformers")
    parser.add_argument("--known", type=int, default=8)
    parser.add_argument("--unseen", default="4,16")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--out", type=Path, default=RECORDS)
    parser.add_argument("words", nargs="*", metavar="WORD")
    asked = parser.parse_args(given)
    unseen = [int(each) for each in asked.unseen.split(",")]
    if asked.known in unseen:
        parser.error(f"--unseen {asked.unseen}: {asked.known} is known")
    script = Script("bench_served")
    servers = [*asked.servers.split(","), *(["vllm_cpu"] if asked.python else [])]
    samples = dict[str, list[float]]()
    with tempfile.TemporaryDirectory() as name:
        results = Path(name)
        passes, _ = ran(results, "bench_serve_modules", *asked.words)
        for number in range(asked.rounds):
            for server in servers:
                how = [f"server={server}", f"task.speeds={passes}", f"task.seed={number}", "task.repeats=1"]
                how += ["task.check_client=false", *asked.words]
                how += [f"server.python={asked.python}"] if server == "vllm_cpu" else []
                served, first = ran(results, "bench_serve_compare", *how, f"task.concurrency={asked.known}")
                if "slower" not in first.summary:
                    parser.error(f"--servers {server}: of its batching nothing is known, and nothing predicted")
                samples.setdefault(f"{server}/slower", []).append(first.summary["slower"])
                for under_way in unseen:
                    words = (*how, f"task.concurrency={under_way}", f"task.served={served}")
                    own = ran(results, "bench_serve_compare", *words)[1].summary
                    for key in FIGURES:
                        off = 100 * (own[f"predicted/{key}"] / own[key] - 1)
                        samples.setdefault(f"{server}/{under_way}/{key}", []).append(off)
    summary = {key: statistics.median(values) for key, values in samples.items()}
    for key in FIGURES:
        medians = [abs(summary[f"{server}/{under_way}/{key}"]) for server in servers for under_way in unseen]
        summary[f"{key}_error_percent"] = statistics.fmean(medians)
    sizes = {"known": asked.known, "unseen": unseen, "rounds": asked.rounds}
    config = {"servers": servers, **sizes, "words": asked.words}
    record = script.left(asked.out, [config], config=config, summary=summary, samples=samples)
    print(show(record))
    return record


if __name__ == "__main__":
    main(sys.argv[1:])
