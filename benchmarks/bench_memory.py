"""Predicted memory against measured, cell by cell, with torch's MemTracker under FakeTensorMode beside it.

    python benchmarks/bench_memory.py [--small] [--ranks 1,2] [--no-peer] [--device cuda] [--rows FILE] [--out DIR]

Measured is a real training step of the shared trainer (`live_steps`): on a CPU every storage that is alive, operator by
operator, weights and the optimizer's state among them; on a GPU `torch.cuda.max_memory_allocated`. Predicted is
`llmsys.cost.memory`, from the config alone. Three numbers of each:

    peak        the most that is alive at once in a step
    accounted   state, and what autograd keeps of a micro-batch: what records and tables compare (`accounted_bytes`)
    static      state alone: weights, gradients, optimizer, master weights

Errors are |predicted / measured - 1|. A cell is a `false_fit` where there is a memory that it is predicted to fit
(with `SLACK` of it left free, as `bench.predict` does) and does not. The peer, MemTracker, can do cells of one rank,
and is asked for the same ones.

It leaves records/bench_memory/<id>/record.json: `samples` has all cells in the order of `config.cells`.
"""

from __future__ import annotations

import argparse
import gc
import json
import os
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import memory_cells
from llmsys import compose, job, schema
from llmsys.cost import case, memory
from llmsys.cost.room import SLACK
from llmsys.job import Record
from llmsys.profile import environment
from script_record import Script

HERE = Path(__file__).parent
RECORDS = HERE / "records"
Row = dict[str, Any]


def predicted(config: dict[str, Any], device: str) -> Row:
    """`peak`, `accounted`, `static` in bytes, and the `seconds` it took."""
    start = time.perf_counter()
    typed = schema.build(config)
    parts, known = (typed.model, typed.train, typed.method, typed.engine), case.facts(typed, device)
    kinds, peak = memory.estimate(*parts, **known), memory.peak_bytes(*parts, **known)
    accounted = sum(kinds.values())
    static = accounted - kinds["activations"] - kinds["logits"]
    return {"peak": peak, "accounted": accounted, "static": static, "seconds": time.perf_counter() - start}


def attempt(what: Callable[..., Row], *arguments: Any) -> Row:
    """What `what` returns of `arguments`, or its `error`: a cell that cannot be measured must not end the others."""
    try:
        return what(*arguments)
    except Exception as error:  # noqa: BLE001
        return {"error": f"{type(error).__name__}: {error}".splitlines()[0]}
    finally:
        gc.collect()


class Ranks:
    """Two ranks that live as long as the cells do; new ones after a cell that failed."""

    def __init__(self) -> None:
        self.pool: Any = None

    def __call__(self, config: dict[str, Any]) -> Row:
        sys.path.append(str(HERE.parent / "tests"))
        from rank_pool import Pool

        search = [str(HERE), os.environ.get("PYTHONPATH", "")]
        os.environ["PYTHONPATH"] = os.pathsep.join(dict.fromkeys(part for part in search if part))
        if self.pool is None or self.pool.failed:
            self.pool = Pool(2)
        return max(self.pool.call("live_steps:measured", config), key=lambda row: row["peak"])


def error(row: Row, what: str) -> float:
    """|predicted / measured - 1| of `peak`, `accounted` or `static`."""
    return abs(row["predicted"][what] / row["measured"][what] - 1)


def false_fit(row: Row) -> bool:
    """Whether some memory is too small for the cell and predicted to be large enough."""
    predicted: float = row["predicted"]["peak"]
    return bool(predicted < (1 - SLACK) * row["measured"]["peak"])


def summary(rows: Sequence[Row]) -> dict[str, float]:
    """Of the cells that were measured."""
    known = [row for row in rows if "peak" in row["measured"]]
    found: dict[str, float] = {"cells": len(rows), "measured": len(known)}
    found["predicted_cells"] = sum("peak" in row["predicted"] for row in rows)
    for what in ("peak", "accounted", "static"):
        errors = [100 * error(row, what) for row in known]
        found |= {f"{what}_error_percent": sum(errors) / len(errors), f"{what}_worst_percent": max(errors)}
    wrong = sum(map(false_fit, known))
    found |= {"false_fits": wrong, "false_fit_percent": 100 * wrong / len(known)}
    found["predict_ms"] = 1e3 * sum(row["predicted"]["seconds"] for row in known) / len(known)
    asked = [row for row in known if row.get("peer")]
    both = [row for row in asked if "peak" in row["peer"]]
    if asked:
        found |= {"peer_asked": len(asked), "peer_cells": len(both)}
    if both:
        theirs = [100 * abs(row["peer"]["peak"] / row["measured"]["peak"] - 1) for row in both]
        ours = [100 * error(row, "peak") for row in both]
        found |= {"peer_error_percent": sum(theirs) / len(both), "peer_worst_percent": max(theirs)}
        found |= {"same_cells_error_percent": sum(ours) / len(both)}
        found["peer_s"] = sum(row["peer"]["seconds"] for row in both) / len(both)
    return found


def show(record: Record) -> str:
    """One record as Markdown: the answer, then all cells, the worst first."""
    s, cells = record.summary, record.config["cells"]
    lines = [
        "| of cells | mean error | worst | must reach |",
        "|---|---:|---:|---:|",
    ]
    for what, bound in (("peak", "5 %"), ("accounted", ""), ("static", "2 %")):
        mean, worst = s[f"{what}_error_percent"], s[f"{what}_worst_percent"]
        lines.append(f"| {what}, {s['measured']:.0f} cells | {mean:.2f} % | {worst:.1f} % | {bound} |")
    lines += [
        "",
        f"Predicted to fit some memory that they do not fit: {s['false_fits']:.0f} of {s['measured']:.0f} cells "
        f"({s['false_fit_percent']:.2f} %, 2 % at most). A prediction takes {s['predict_ms']:.1f} ms.",
    ]
    if "peer_error_percent" in s:
        lines.append(
            f"MemTracker, on {s['peer_cells']:.0f} of {s['peer_asked']:.0f} cells of one rank that it can do: "
            f"{s['peer_error_percent']:.2f} %, worst {s['peer_worst_percent']:.1f} %, {s['peer_s']:.1f} s each; "
            f"ours on the same {s['same_cells_error_percent']:.2f} %."
        )
    lines += ["", "| cell | measured MiB | predicted | error | MemTracker |", "|---|---:|---:|---:|---:|"]
    samples = record.samples
    rows = zip(cells, samples["measured_peak"], samples["predicted_peak"], samples["peer_peak"], strict=True)
    for name, measured, wanted, peer in sorted(rows, key=lambda row: -abs(row[2] / row[1] - 1) if row[1] else -9):
        if not measured:
            lines.append(f"| {name} | {record.notes.get(name, 'not measured')} | {wanted / 2**20:.2f} | | |")
            continue
        other = f"{100 * (peer / measured - 1):+.1f} %" if peer else ""
        change = 100 * (wanted / measured - 1)
        lines.append(f"| {name} | {measured / 2**20:.2f} | {wanted / 2**20:.2f} | {change:+.1f} % | {other} |")
    return "\n".join(lines)


def _measured(config: dict[str, Any], two: Ranks, *, peer: bool) -> Row:
    """`measured`, and of one rank the `peer`'s."""
    import live_steps
    import mem_tracker
    from llmsys.comm.place import Place

    alone = config["train"]["world"] == 1
    measured = attempt(live_steps.measured, Place(), config) if alone else attempt(two, config)
    if "held" in measured:
        measured |= {"static": measured["held"], "accounted": measured["held"] + measured["saved"]}
    return {"measured": measured, **({"peer": attempt(mem_tracker.tracked, config)} if alone and peer else {})}


def _read(path: Path | None) -> dict[str, Row]:
    """The rows of a file, by name."""
    if path is None or not path.is_file():
        return {}
    rows = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
    return {row["name"]: row for row in rows}


def _append(path: Path | None, row: Row) -> None:
    if path is not None:
        with path.open("a", encoding="utf-8") as file:
            file.write(json.dumps(row) + "\n")


def main(words: Sequence[str]) -> Record:
    """Measures all cells, writes the record, prints its tables, and returns it."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--small", action="store_true", help="two cells, to try the script")
    parser.add_argument("--ranks", default="1,2", help="cells of one rank, of two, or both")
    parser.add_argument("--rows", type=Path, help="each cell is added to this file; those in it are not run again")
    parser.add_argument("--no-peer", action="store_true", help="without MemTracker")
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--only", default="", help="cells whose name has this")
    parser.add_argument("--out", type=Path, default=RECORDS)
    asked = parser.parse_args(words)
    wanted = asked.ranks.split(",")
    cells = memory_cells.one_rank() if "1" in wanted else []
    cells += memory_cells.two_ranks() if "2" in wanted else []
    if asked.small:
        cells = memory_cells.small()
    elif asked.device == "cuda":
        cells = memory_cells.gpu()
    script = Script("bench_memory")
    there = _read(asked.rows)
    rows: list[Row] = []
    two = Ranks()
    for name, overrides in cells:
        if asked.only not in name:
            continue
        composed = compose.compose([*memory_cells.BASE, *overrides, f"hardware.device={asked.device}"])
        config, _ = job.resolved(composed)
        row = there.get(name, {})
        row["predicted"] = predicted(config, asked.device)
        if "measured" not in row:
            row |= {"name": name, **_measured(config, two, peer=not asked.no_peer)}
            if "error" not in row["measured"]:
                _append(asked.rows, row)
        rows.append(row)
        measured = row["measured"]
        said = measured.get("error") or f"{100 * (row['predicted']['peak'] / measured['peak'] - 1):+.2f} %"
        print(f"{name}: {said} {row.get('peer', {}).get('error', '')}", file=sys.stderr, flush=True)
    names = [row["name"] for row in rows]
    notes = {row["name"]: row["measured"]["error"] for row in rows if "error" in row["measured"]}
    notes |= {f"MemTracker: {r['name']}": r["peer"]["error"] for r in rows if "error" in r.get("peer", {})}
    identity = [names, asked.device, environment.describe(asked.device, 1).get("device_name")]
    record = script.left(
        asked.out,
        identity,
        config={"ranks": asked.ranks, "only": asked.only, "cells": names, "train": {"threads": 1}},
        env=environment.describe(asked.device, 1),
        summary=summary(rows),
        samples={
            **{f"measured_{key}": [r["measured"].get(key, 0) for r in rows] for key in ("peak", "accounted", "static")},
            **{f"predicted_{key}": [r["predicted"][key] for r in rows] for key in ("peak", "accounted", "static")},
            "peer_peak": [r.get("peer", {}).get("peak", 0) for r in rows],
            "peer_s": [r.get("peer", {}).get("seconds", 0.0) for r in rows],
        },
        notes=notes,
    )
    print(show(record))
    return record


if __name__ == "__main__":
    main(sys.argv[1:])
