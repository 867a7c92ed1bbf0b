"""`python -m llmsys.compress.measure [FOLDER]`: the tables of all records of measured iterations under a folder."""

from __future__ import annotations

from llmsys import results
from llmsys.compress.measure import tables
from llmsys.job import Record


def table(record: Record) -> str:
    row = results.row(record)
    where = f"# {record.name}, {row['engine']}, {row['network']} ({record.run_id})"
    return f"{where}\n\n{tables.markdown(record.summary, record.world)}"


if __name__ == "__main__":
    results.print_tables("compress_iteration", "llmsys.compress.measure", table, also=["compress_replay"])
