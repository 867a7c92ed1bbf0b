"""`python -m llmsys.results compare --published FILE.csv [FOLDER...]`."""

from __future__ import annotations

import argparse
import csv
import io
import os
import sys
from collections.abc import Sequence
from pathlib import Path

from llmsys import results
from llmsys.bench import cells
from llmsys.bench.published.compare import Comparison, Line, compare
from llmsys.bench.published.table import KEYS, OOM, Row, Table, read
from llmsys.bench.report.html import number, signed

SHOWN = 20
"""Cells of ours that the table has not: so many are named."""


def main(words: Sequence[str] | None = None) -> None:
    """Prints the deltas, and what has no counterpart; exit code 1 and one line for a file or folder that is wrong."""
    parser = argparse.ArgumentParser(
        prog="python -m llmsys.results compare", description="Published numbers beside our records, cell by cell."
    )
    root = os.environ.get("LLMSYS_RESULTS", "results")
    parser.add_argument("--published", type=Path, required=True, metavar="FILE", help="published/<paper>_<table>.csv")
    parser.add_argument("roots", nargs="*", default=[root], metavar="FOLDER", help=f"default: {root}")
    parser.add_argument(
        "--ignore", action="append", default=[], choices=KEYS, help="compare whatever this key is; once for each key"
    )
    parser.add_argument("--csv", action="store_true", help="every pair of numbers, unrounded, as CSV")
    arguments = parser.parse_args(words)
    try:
        if not arguments.published.is_file():
            raise ValueError(f"--published {arguments.published}: no such file; published/ has templates")
        table = read(arguments.published)
        records = [record for folder in dict.fromkeys(arguments.roots) for record in results.read(folder)]
        found = compare(table, records, arguments.ignore)
    except (ValueError, OSError) as error:
        sys.exit(f"llmsys.results: {error}")
    if arguments.csv:
        print(as_csv(table, found), end="")
    else:
        show(table, found)


def show(table: Table, found: Comparison) -> None:
    """Prints a comparison."""
    rows = len(table.rows)
    print(f"{table.name}: {rows - len(found.missing)} of {rows} rows have a record of ours")
    if found.lines:
        results.print_lines(*lines(table, found.lines))
    empty = sum(len(table.columns) - len(row.numbers) for row in table.rows)
    if empty:
        print(
            f"Not filled in: {empty} of {rows * len(table.columns)} numbers. Whoever has the paper can, with a source."
        )
    if found.missing:
        print("\nIn the file, and no record of ours:")
        for what, techniques in grouped(found.missing).items():
            print(f"  {what}: {', '.join(techniques)}" if any(techniques) else f"  {what}")
    for key, count in found.without.items():
        print(f"Were {key} not compared (--ignore {key}), {count} of {rows} rows would have one.")
    if found.spare:
        print("\nOurs, and not in the file:")
        for cell in found.spare[:SHOWN]:
            where = f"{cell.world} x {cell.card or cells.device(cell.record)}"
            what = f"batch {cell.batch}, length {cell.settings.get('train.length')}"
            print(f"  {cell.settings.get('model.name')} {cell.label}, {where}, {what}: {cell.record.run_id}")
        if len(found.spare) > SHOWN:
            print(f"  and {len(found.spare) - SHOWN} more")


def grouped(rows: Sequence[Row]) -> dict[str, list[str]]:
    """All keys but techniques -> the techniques of the rows that have them."""
    found: dict[str, list[str]] = {}
    for row in rows:
        rest = ", ".join(_key(key, value) for key, value in row.keys.items() if key != "techniques") or "any"
        found.setdefault(rest, []).append(row.keys.get("techniques", ""))
    return found


def _key(key: str, value: str) -> str:
    return value if key in ("hardware", "model", "module") else f"{key} {value}"


def lines(table: Table, found: Sequence[Line]) -> tuple[list[str], list[list[str]]]:
    """Headers and cells: the keys that differ, the number, published and ours, the delta and the run."""
    keys = [key for key in table.keys if len({line.row.keys.get(key) for line in found}) > 1] or list(table.keys[:1])
    body = [
        [
            *(line.row.keys.get(key, "any") for key in keys),
            line.quantity,
            line.unit,
            _published(line),
            _ours(line),
            _delta(line),
            line.row.source or "–",
            " ".join([line.cell.record.run_id, *(f"({mark})" for _, mark in line.cell.marks)]),
        ]
        for line in found
    ]
    return [*keys, "number", "unit", "published", "ours", "delta", "source", "run"], body


def _published(line: Line) -> str:
    if line.published is None:
        return "–"
    return "out of memory" if line.published == OOM else number(line.published / line.scale)


def _ours(line: Line) -> str:
    if line.ours is not None:
        return number(line.ours / line.scale)
    return "–" if line.cell.ok else line.cell.ending


def _delta(line: Line) -> str:
    if line.delta is not None:
        return f"{line.delta:+.1f} points" if line.share else signed(line.delta)
    if line.published == OOM and line.cell.record.status == "oom":
        return "as published"
    if line.published == OOM and line.cell.ok:
        return "ours fits"
    return "–"


def as_csv(table: Table, found: Comparison) -> str:
    """Every line in the units of the file, unrounded; rows that we have nothing of have no run."""
    out = io.StringIO()
    writer = csv.writer(out, lineterminator="\n")
    writer.writerow([*table.keys, "number", "unit", "published", "ours", "delta", "source", "status", "run"])
    for line in found.lines:
        published = "oom" if line.published == OOM else _scaled(line.published, line.scale)
        own = [line.quantity, line.unit, published, _scaled(line.ours, line.scale), _scaled(line.delta, 1.0)]
        writer.writerow(
            [
                *(line.row.keys.get(key, "") for key in table.keys),
                *own,
                line.row.source,
                line.cell.record.status,
                line.cell.record.run_id,
            ]
        )
    for row in found.missing:
        for column in table.columns:
            value = row.numbers.get(column.header)
            scale = table.quantity(column, row).units[column.unit]
            published = "oom" if value == OOM else _scaled(value, scale)
            keys = [row.keys.get(key, "") for key in table.keys]
            writer.writerow([*keys, column.name, column.unit, published, "", "", row.source, "", ""])
    return out.getvalue()


def _scaled(value: float | None, scale: float) -> str:
    return "" if value is None else repr(value / scale)


if __name__ == "__main__":
    main()
