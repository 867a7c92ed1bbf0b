"""How long `results.load` takes over ten thousand records, and the same by hand.

    python benchmarks/results_load.py [--records 10000] [--of train | all] [--rounds 7] [--out benchmarks/records]

The records are copies of the published ones under run ids of their own: of trainings (`train`), which is what large
sweeps are, or of every kind (`all`), whose ledgers and operators have five thousand columns between them.

Four ways take turns, in one order and the next round in the other, each in a fresh process after its imports:
`cold`, without a cache, which it leaves; `cached`; `stale`, with one record in a hundred written again since; and the
peer, `by_hand`: `rglob`, `json.loads`, and `pandas.DataFrame` of the flattened dicts, without checks. That the cached
frame equals the uncached one is asserted. Files are in the system's cache throughout.

The record has the seconds of each: medians, quartiles, and the median over the rounds of by hand / cold with its 95 %
interval; CPU seconds beside them, for a machine that has other work. To be reached over ten thousand trainings: 2 s
cold and 0.3 s cached.
"""

from __future__ import annotations

import argparse
import hashlib
import os
import random
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path

from llmsys import cells_cache
from llmsys.job import Record
from llmsys.table import piped
from script_record import RECORDS, Script
from side_by_side import median_interval

WAYS = ("cold", "cached", "stale", "by_hand")
_AGO_NS = 3600 * 10**9
_LOAD = """
import sys, time
begin = time.perf_counter()
import pandas, pyarrow.parquet
from llmsys import cells_cache, results
imported, before = time.perf_counter(), time.process_time()
cells_cache.LEAST = 1
frame = results.load(sys.argv[1])
print(imported - begin, time.perf_counter() - imported, time.process_time() - before, *frame.shape)
"""
_BY_HAND = """
import json, sys, time
begin = time.perf_counter()
import pandas
from pathlib import Path
imported, before = time.perf_counter(), time.process_time()
def flat(values, prefix=""):
    for key, value in values.items():
        if isinstance(value, dict):
            yield from flat(value, f"{prefix}{key}.")
        else:
            yield prefix + key, value
rows = []
for path in sorted(Path(sys.argv[1]).rglob("record.json")):
    record = json.loads(path.read_text())
    del record["samples"]
    rows.append(dict(flat(record)))
frame = pandas.DataFrame(rows)
print(imported - begin, time.perf_counter() - imported, time.process_time() - before, *frame.shape)
"""


def copy(root: Path, number: int, of: str) -> int:
    """Makes `number` records below `root` of the published ones, each in its turn, an hour old; bytes."""
    texts = []
    for path in sorted(RECORDS.rglob("record.json")):
        record = Record.read(path.parent)
        if record is not None and (of == "all" or record.task == "train"):
            texts.append((record.name, record.run_id, path.read_text()))
    written = 0
    for index in range(number):
        name, run_id, text = texts[index % len(texts)]
        new = hashlib.sha256(f"{index}".encode()).hexdigest()[:12]
        path = root / name / new / "record.json"
        path.parent.mkdir(parents=True)
        written += path.write_bytes(text.replace(f'"run_id": "{run_id}"', f'"run_id": "{new}"', 1).encode())
        _older(path)
    return written


def _older(path: Path) -> None:
    stat = path.stat()
    os.utime(path, ns=(stat.st_atime_ns, time.time_ns() - _AGO_NS))


def change(root: Path, share: float, seed: int) -> None:
    """Writes that share of the records again, as they are."""
    paths = sorted(root.rglob("record.json"))
    for path in random.Random(seed).sample(paths, max(1, round(share * len(paths)))):
        path.write_bytes(path.read_bytes())
        _older(path)


def take(way: str, root: Path, turn: int) -> tuple[float, float, float, int]:
    """(seconds of the imports, of the loading, its CPU seconds, columns), in a fresh process."""
    prepared: dict[str, Callable[[], None]] = {
        "cold": lambda: (root / cells_cache.NAME).unlink(missing_ok=True),
        "stale": lambda: change(root, 0.01, turn),
    }
    prepared.get(way, lambda: None)()
    command = [sys.executable, "-c", _BY_HAND if way == "by_hand" else _LOAD, str(root)]
    said = subprocess.run(command, check=True, capture_output=True, text=True).stdout.split()
    if way != "by_hand" and not (root / cells_cache.NAME).exists():
        raise RuntimeError(f"{way}: no cache was left")
    return float(said[0]), float(said[1]), float(said[2]), int(said[4])


def check(root: Path) -> None:
    """Leaves a cache, and asserts that with it the frame is what it is without."""
    from pandas.testing import assert_frame_equal

    from llmsys import cells

    fresh = cells.frame(cells_cache.load(root, cache=False))
    for _ in range(2):
        assert_frame_equal(cells.frame(cells_cache.load(root)), fresh, check_exact=True)


def summary(samples: dict[str, list[float]]) -> dict[str, float]:
    """Medians and quartiles of each way, and the peer over ours."""
    found: dict[str, float] = {}
    for name, values in samples.items():
        first, middle, third = statistics.quantiles(values, n=4, method="inclusive")
        found |= {f"{name}_p50": middle, f"{name}_p25": first, f"{name}_p75": third}
    for way in WAYS[:3]:
        ratios = [peer / ours for peer, ours in zip(samples["by_hand_s"], samples[f"{way}_s"], strict=True)]
        low, middle, high = median_interval(ratios)
        found |= {f"by_hand_over_{way}": middle, f"by_hand_over_{way}_low": low, f"by_hand_over_{way}_high": high}
    return {key: round(value, 4) for key, value in found.items()}


def show(record: Record) -> str:
    """One record as Markdown."""
    s = record.summary
    rows = []
    for way in WAYS:
        first, middle, third = (s[f"{way}_s_{key}"] for key in ("p25", "p50", "p75"))
        ratio = "–"
        if way != "by_hand":
            low, over, high = (s[f"by_hand_over_{way}{end}"] for end in ("_low", "", "_high"))
            ratio = f"{over:.1f} ({low:.1f} to {high:.1f})"
        cpu = f"{s[f'{way}_cpu_s_p50']:.2f} ({s[f'{way}_cpu_s_p25']:.2f} to {s[f'{way}_cpu_s_p75']:.2f})"
        rows.append([way.replace("_", " "), f"{middle:.2f} ({first:.2f} to {third:.2f})", cpu, ratio])
    head = f"{s['records']:,.0f} records of {record.config['of']}, {s['columns']:,.0f} columns, {s['mib']:,.0f} MiB"
    lines = piped((head, "s (quartiles)", "CPU s (quartiles)", "by hand takes times (95 % interval)"), rows)
    imports = f"Imports before: {s['imports_s_p50']:.2f} s ({s['imports_s_p25']:.2f} to {s['imports_s_p75']:.2f})."
    return "\n".join([*lines, "", f"{imports} {record.config['rounds']} rounds, {record.env['device_name']}."])


def main(words: Sequence[str]) -> Record:
    """Measures, writes the record, prints its table, and returns it."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--records", type=int, default=10_000)
    parser.add_argument("--of", choices=("train", "all"), default="train")
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--out", type=Path, default=RECORDS)
    asked = parser.parse_args(words)
    script = Script("results_load")
    samples: dict[str, list[float]] = {f"{way}_{clock}": [] for way in WAYS for clock in ("s", "cpu_s")}
    samples["imports_s"] = []
    least, cells_cache.LEAST = cells_cache.LEAST, 1
    try:
        with tempfile.TemporaryDirectory() as folder:
            root = Path(folder)
            size = copy(root, asked.records, asked.of)
            check(root)
            for turn in range(asked.rounds):
                for way in WAYS if turn % 2 == 0 else WAYS[::-1]:
                    imports, seconds, busy, columns = take(way, root, turn)
                    samples[f"{way}_s"].append(round(seconds, 4))
                    samples[f"{way}_cpu_s"].append(round(busy, 4))
                    if way == "cached":
                        samples["imports_s"].append(round(imports, 4))
                        ours = columns
    finally:
        cells_cache.LEAST = least
    record = script.left(
        asked.out,
        f"{asked.records}x{asked.of}",
        config={"records": asked.records, "of": asked.of, "rounds": asked.rounds},
        summary={"records": asked.records, "columns": ours, "mib": round(size / 2**20, 1), **summary(samples)},
        samples=samples,
    )
    print(show(record))
    return record


if __name__ == "__main__":
    main(sys.argv[1:])
