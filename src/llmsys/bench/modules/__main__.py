"""`python -m llmsys.bench.modules [FOLDER]`: the tables of all bench_modules records under a folder."""

from __future__ import annotations

from llmsys import results
from llmsys.bench.modules import tables
from llmsys.job import Record


def table(record: Record) -> str:
    return tables.markdown(record.summary, str(record.config["model"]["name"]))


if __name__ == "__main__":
    results.print_tables("bench_modules", "llmsys.bench.modules", table)
