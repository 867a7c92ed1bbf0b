"""The only reader of records: tables, pictures and data frames of everything under a folder.

    python -m llmsys.results [FOLDER] [--over-repeats | --over-seeds] [--best KEY] [--markdown | --csv] [--plot x:y]
    python -m llmsys.results best --metric KEY [FOLDER]       the best run of each experiment and method
    python -m llmsys.results markdown [FOLDER]                the table, to paste into a README
    python -m llmsys.results diff A B                         what differs between two runs, or two folders of runs
    python -m llmsys.results compare --published FILE.csv [FOLDER...]

Runs that failed or ran out of memory keep their row. Records of one data set whose content differs are marked, and so
are tables and pictures of rows that are of several revisions of the code. Tasks whose numbers have tables of their own
(`tasks.TABLES`) are named below, or, where there is nothing else, shown.
"""

from __future__ import annotations

import argparse
import os
import sys
from collections import Counter
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from llmsys import record_diff, record_files, tasks
from llmsys.job import Record
from llmsys.record_diff import diff
from llmsys.revisions import mixed, revisions
from llmsys.rows import SHARED_KEYS, Row, best, numbers, over_repeats, over_seeds, row
from llmsys.table import markdown, table, to_csv

if TYPE_CHECKING:
    import pandas

__all__ = [
    "SHARED_KEYS",
    "best",
    "diff",
    "load",
    "markdown",
    "mixed",
    "over_repeats",
    "over_seeds",
    "plot",
    "read",
    "revisions",
    "row",
    "show",
    "table",
    "to_csv",
]


def read(root: str | Path) -> list[Record]:
    """All records under `root`, in the order of their paths; what cannot be read is named on standard error.

    ValueError if there is no such folder or no record below it.
    """
    records = []
    with record_files.no_collection():
        for found in record_files.find(root):
            try:
                record = record_files.record(os.path.join(root, found.path), samples=True)
            except (ValueError, OSError) as error:
                record_files.left_out(error)
                continue
            if record is not None:
                records.append(record)
    if not records:
        raise record_files.nothing(root)
    return records


def load(root: str | Path = "results", *, cache: bool = True) -> pandas.DataFrame:
    """All records under `root` as a data frame: identity, summary, and the whole config as `config.<key>` columns.

    Of a thousand records or more a cache is kept (`llmsys.cells_cache`), unless `cache` is False: the next time only
    what has changed since is read. The frame is the same. ValueError as of `read`.
    """
    from llmsys import cells, cells_cache

    with record_files.no_collection():
        return cells.frame(cells_cache.load(root, cache=cache))


def show(records: Sequence[Record]) -> None:
    """Prints the table of `records` to standard output, but for those that have tables of their own."""
    rows = [row(record) for record in records if not tasks.has_tables(record)]
    if rows:
        _print(rows)


def _print(rows: Sequence[Row]) -> None:
    print_lines(*table(rows))
    if said := mixed(rows):
        print(said)


def print_lines(headers: Sequence[str], lines: Sequence[Sequence[str]]) -> None:
    """Prints cells under headers, ruled, to standard output; whole lines where that is no terminal."""
    from rich.console import Console
    from rich.table import Table

    pretty = Table()
    for index, header in enumerate(headers):
        pretty.add_column(header, justify="left" if index == 0 else "right")
    for line in lines:
        pretty.add_row(*line)
    console = Console()
    if not console.is_terminal:
        widths = (max(map(len, cells)) for cells in zip(headers, *lines, strict=True))
        console = Console(width=sum(width + 3 for width in widths) + 1)
    console.print(pretty)


def plot(rows: Sequence[Row], x: str, y: str, path: Path) -> None:
    """A picture of summary key `y` over `x`, one labelled point a row, with standard errors or deviations as bars;
    where rows are of several revisions, a line below says so. ValueError where no row has both keys."""
    from llmsys.plot import scatter

    there = [each for each in rows if all(isinstance(each.get(key), int | float) for key in (x, y))]
    if not there:
        raise ValueError(f"--plot {x}:{y}: no record has both; there are {', '.join(numbers(rows))}")
    scatter(there, x, y, path, mixed(there))


def print_tables(task: str, package: str, table: Callable[[Record], str], *, also: Sequence[str] = ()) -> None:
    """The command line of a package whose `task`, and those `also` named, have tables of their own: `table` of each
    record under a folder."""
    parser = argparse.ArgumentParser(prog=f"python -m {package}", description=f"Tables of all records of {task}.")
    root = os.environ.get("LLMSYS_RESULTS", "results")
    parser.add_argument("root", nargs="?", default=root, help="a folder with runs below it (default: %(default)s)")
    try:
        folder = parser.parse_args().root
        found = [record for record in read(folder) if record.task in (task, *also) and record.summary]
        if not found:
            raise ValueError(f"{folder}: no record of the task {task}; python -m llmsys +exp={task}")
    except (ValueError, OSError) as error:
        sys.exit(f"{package}: {error}")
    for record in found:
        print(table(record))


def _apart(records: Sequence[Record], root: str) -> None:
    """Prints tables that records have of their own, or, where there are records of other tasks, the commands that do:
    such tables are long."""
    found = [record for record in records if tasks.has_tables(record)]
    if all(record.task in (*tasks.TABLES, tasks.SCRIPTS) for record in records):
        for record in found:
            print(tasks.table(record))
        return
    scripts = Counter(record.name for record in found if record.task == tasks.SCRIPTS)
    for task, number in Counter(record.task for record in found if record.task != tasks.SCRIPTS).items():
        print(f"{task}: {number} records: python -m {tasks.TABLES[task]} {root}", file=sys.stderr)
    for name, number in scripts.items():
        print(f"{name}: {number} records of a script: python -m llmsys.results {root}/{name}", file=sys.stderr)


def _best(words: Sequence[str]) -> None:
    parser = argparse.ArgumentParser(
        prog="python -m llmsys.results best",
        description="The best run of each experiment, model, data set, device, method and compression: the largest "
        "KEY, of losses, times and memory the smallest.",
    )
    parser.add_argument("--metric", metavar="KEY", required=True, help="a key of summaries, e.g. accuracy")
    _folder(parser)
    form = parser.add_mutually_exclusive_group()
    form.add_argument("--markdown", action="store_true", help="the table as Markdown")
    form.add_argument("--csv", action="store_true", help="every value, unrounded, as CSV")
    asked = parser.parse_args(words)
    rows = best([row(record) for record in read(asked.root)], asked.metric, option="--metric")
    _write(rows, asked)


def _markdown(words: Sequence[str]) -> None:
    parser = argparse.ArgumentParser(
        prog="python -m llmsys.results markdown", description="The table as Markdown, to paste into a README."
    )
    _folder(parser)
    asked = parser.parse_args(words)
    records = read(asked.root)
    if rows := [row(record) for record in records if not tasks.has_tables(record)]:
        print(markdown(rows))
    _apart(records, asked.root)


def _folder(parser: argparse.ArgumentParser) -> None:
    root = os.environ.get("LLMSYS_RESULTS", "results")
    parser.add_argument("root", nargs="?", default=root, help="a folder with runs below it (default: %(default)s)")


def _write(rows: Sequence[Row], asked: argparse.Namespace) -> None:
    """Rows in the form asked for, where there are any."""
    if rows and asked.markdown:
        print(markdown(rows))
    elif rows and asked.csv:
        print(to_csv(rows), end="")
    elif rows:
        _print(rows)


def main() -> None:
    """`python -m llmsys.results`."""
    commands = {"compare": _compare, "diff": record_diff.main, "best": _best, "markdown": _markdown}
    first = sys.argv[1] if len(sys.argv) > 1 else "-"
    try:
        if first in commands:
            commands[first](sys.argv[2:])
        elif not first.startswith("-") and not Path(first).exists():
            raise ValueError(f"{first}: no such folder; commands are {', '.join(commands)}")
        else:
            _tables(sys.argv[1:])
    except (ValueError, OSError) as error:
        sys.exit(f"llmsys.results: {error}")


def _compare(words: Sequence[str]) -> None:
    from llmsys import wiring

    wiring.comparison().main(words)


def _tables(words: Sequence[str]) -> None:
    parser = argparse.ArgumentParser(
        prog="python -m llmsys.results",
        description="Tables and pictures of records.",
        epilog="Commands, each with a --help of its own (a folder of such a name is ./NAME): "
        "best --metric KEY [FOLDER]: the best runs; markdown [FOLDER]: the table to paste; "
        "diff A B: what differs between runs; "
        "compare --published FILE.csv [FOLDER...]: published numbers beside our records.",
    )
    _folder(parser)
    merge = parser.add_mutually_exclusive_group()
    merge.add_argument("--over-seeds", action="store_true", help="one row per group of seeds: mean ± sd")
    merge.add_argument(
        "--over-repeats", action="store_true", help="one row per cell: mean, 95 %% interval and CV over fresh processes"
    )
    parser.add_argument("--best", metavar="KEY", help="of each method only the row with the best KEY, e.g. accuracy")
    form = parser.add_mutually_exclusive_group()
    form.add_argument("--markdown", action="store_true", help="the table as Markdown")
    form.add_argument("--csv", action="store_true", help="every value, unrounded, as CSV")
    parser.add_argument("--plot", metavar="X:Y", help="a picture of Y over X, e.g. accounted_bytes:accuracy")
    parser.add_argument("--out", type=Path, help="where the picture goes (default: <root>/<X>-<Y>.png)")
    asked = parser.parse_args(words)
    records = read(asked.root)
    whole = asked.over_seeds or asked.best or asked.csv or asked.plot
    rows = [row(record) for record in records if whole or not tasks.has_tables(record)]
    rows = over_seeds(rows) if asked.over_seeds else rows
    rows = over_repeats(rows) if asked.over_repeats else rows
    rows = best(rows, asked.best) if asked.best else rows
    if asked.plot:
        x, colon, y = asked.plot.partition(":")
        if not colon:
            raise ValueError(f"--plot {asked.plot}: must be X:Y, e.g. accounted_bytes:accuracy")
        path = asked.out or Path(asked.root) / f"{x}-{y}.png"
        plot(rows, x, y, path)
        print(path)
    else:
        _write(rows, asked)
    if not whole:
        _apart(records, asked.root)


if __name__ == "__main__":
    main()
