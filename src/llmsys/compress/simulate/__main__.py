"""`python -m llmsys.compress.simulate [FOLDER]`: the tables of all records of simulations under a folder."""

from __future__ import annotations

from llmsys import results, schema
from llmsys.compress.simulate import tables, task
from llmsys.job import Record


def table(record: Record) -> str:
    return tables.markdown(record.summary, task.notes(schema.build(record.config)))


if __name__ == "__main__":
    results.print_tables("compress_simulate", "llmsys.compress.simulate", table)
