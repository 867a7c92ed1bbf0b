"""`python -m llmsys.lorafa.ledger [FOLDER]`: the tables of all ledger records under a folder."""

from __future__ import annotations

import argparse
import os
import sys

from llmsys import results
from llmsys.lorafa.ledger import tables


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m llmsys.lorafa.ledger", description="Tables of ledger records.")
    root = os.environ.get("LLMSYS_RESULTS", "results")
    parser.add_argument("root", nargs="?", default=root, help="a folder with runs below it (default: %(default)s)")
    try:
        folder = parser.parse_args().root
        found = [record for record in results.read(folder) if record.task == "lorafa_ledger" and record.summary]
        if not found:
            raise ValueError(f"{folder}: no record of the task lorafa_ledger; python -m llmsys +exp=lorafa_ledger")
    except (ValueError, OSError) as error:
        sys.exit(f"llmsys.lorafa.ledger: {error}")
    for record in found:
        print(tables.markdown(record.summary, str(record.config["model"]["name"])))


if __name__ == "__main__":
    main()
