"""`python -m llmsys.compress.simulate [FOLDER]`: the tables of all records of simulations under a folder."""

from __future__ import annotations

import argparse
import os
import sys

from llmsys import results, schema
from llmsys.compress.simulate import tables, task


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m llmsys.compress.simulate", description="Tables of simulations.")
    root = os.environ.get("LLMSYS_RESULTS", "results")
    parser.add_argument("root", nargs="?", default=root, help="a folder with runs below it (default: %(default)s)")
    try:
        folder = parser.parse_args().root
        found = [record for record in results.read(folder) if record.task == "compress_simulate" and record.summary]
        if not found:
            raise ValueError(
                f"{folder}: no record of the task compress_simulate; python -m llmsys +exp=compress_simulate"
            )
    except (ValueError, OSError) as error:
        sys.exit(f"llmsys.compress.simulate: {error}")
    for record in found:
        print(tables.markdown(record.summary, task.notes(schema.build(record.config))))


if __name__ == "__main__":
    main()
