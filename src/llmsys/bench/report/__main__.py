"""`python -m llmsys.bench.report [FOLDER...] [-o report.html]`."""

from __future__ import annotations

import argparse
import os
import sys
from pathlib import Path

from llmsys import results
from llmsys.bench.report.page import page
from llmsys.files import write_atomic


def main(words: list[str] | None = None) -> None:
    """Writes the page and prints its path; exit code 1 and one line where there is nothing to report on."""
    parser = argparse.ArgumentParser(
        prog="python -m llmsys.bench.report", description="One page of HTML on all records below the folders."
    )
    root = os.environ.get("LLMSYS_RESULTS", "results")
    parser.add_argument("roots", nargs="*", default=[root], metavar="FOLDER", help=f"default: {root}")
    parser.add_argument("-o", "--out", type=Path, default=Path("report.html"), help="default: %(default)s")
    arguments = parser.parse_args(words)
    try:
        records = [record for folder in dict.fromkeys(arguments.roots) for record in results.read(folder)]
        once = {(record.name, record.run_id): record for record in records}
        text = page(list(once.values()), ", ".join(Path(folder).name or str(folder) for folder in arguments.roots))
        _write(arguments.out, text)
    except (ValueError, OSError) as error:
        sys.exit(f"llmsys.bench.report: {error}")
    print(arguments.out)


def _write(out: Path, text: str) -> None:
    """Atomically, into a folder that is made; to what is no file (a terminal, a pipe) as it is. ValueError for a
    folder."""
    if out.is_dir():
        raise ValueError(f"-o {out}: is a folder; it is a file")
    if out.exists() and not out.is_file():
        out.write_text(text, encoding="utf-8")
    else:
        out.parent.mkdir(parents=True, exist_ok=True)
        write_atomic(out, text)


if __name__ == "__main__":
    main()
