"""`python -m llmsys.bench.ops [FOLDER]`: the tables of all bench_ops records under a folder."""

from __future__ import annotations

from llmsys import results
from llmsys.bench.ops import tables
from llmsys.job import Record


def table(record: Record) -> str:
    return tables.markdown(record.summary, f"{record.config['model']['name']} on {record.env['device_name']}")


if __name__ == "__main__":
    results.print_tables("bench_ops", "llmsys.bench.ops", table)
