"""Loads of engines, predicted from passes of the model and one other load of each engine.

    python benchmarks/bench_served.py [--python VENV/bin/python] [--servers static,transformers] [--known 8]
        [--unseen 4,16] [--repeats 3] [--out FOLDER] [WORD ...]

By the commands that a user gives: `bench_serve_modules` times passes; each engine serves a load with `--known` requests
under way, which says how many times as long passes take in it (`llmsys.bench.serve.slower`); then loads with as many
under way as `--unseen` says are predicted with that, and measured. `--python`: the interpreter of vLLM's virtual
environment, with which `vllm_cpu` is one of the engines. WORDs are settings of every run.
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
    own = record.summary
    loads = list(dict.fromkeys(key.rpartition("/")[0] for key in own if key.count("/") == 2))
    rows = []
    for load in loads:
        server, _, under_way = load.partition("/")
        known = f"{own[f'{server}/slower']:.3g}"
        rows.append([server, under_way, known, *(f"{own[f'{load}/{key}']:+.1f} %" for key in FIGURES)])
    rows.append(["mean, of either sign", "", "", *(f"{own[f'{key}_error_percent']:.1f} %" for key in FIGURES)])
    heads = ("engine", "under way", "passes take x times as long", *(f"{each}: off" for each in FIGURES.values()))
    return "\n".join(piped(heads, rows))


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
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--out", type=Path, default=RECORDS)
    parser.add_argument("words", nargs="*", metavar="WORD")
    asked = parser.parse_args(given)
    unseen = [int(each) for each in asked.unseen.split(",")]
    if asked.known in unseen:
        parser.error(f"--unseen {asked.unseen}: {asked.known} is known")
    script = Script("bench_served")
    servers = [*asked.servers.split(","), *(["vllm_cpu"] if asked.python else [])]
    summary = dict[str, float]()
    with tempfile.TemporaryDirectory() as name:
        results = Path(name)
        passes, _ = ran(results, "bench_serve_modules", *asked.words)
        for server in servers:
            how = [f"server={server}", f"task.speeds={passes}", f"task.repeats={asked.repeats}"]
            how += [f"server.python={asked.python}"] if server == "vllm_cpu" else []
            served, first = ran(results, "bench_serve_compare", *how, f"task.concurrency={asked.known}", *asked.words)
            summary[f"{server}/slower"] = first.summary["slower"]
            for under_way in unseen:
                words = (*how, f"task.concurrency={under_way}", f"task.served={served}", *asked.words)
                own = ran(results, "bench_serve_compare", *words)[1].summary
                for key in FIGURES:
                    summary[f"{server}/{under_way}/{key}"] = 100 * (own[f"predicted/{key}"] / own[key] - 1)
    for key in FIGURES:
        off = [abs(summary[f"{server}/{under_way}/{key}"]) for server in servers for under_way in unseen]
        summary[f"{key}_error_percent"] = statistics.fmean(off)
    sizes = {"known": asked.known, "unseen": unseen, "repeats": asked.repeats}
    config = {"servers": servers, **sizes, "words": asked.words}
    record = script.left(asked.out, [config], config=config, summary=summary)
    print(show(record))
    return record


if __name__ == "__main__":
    main(sys.argv[1:])
