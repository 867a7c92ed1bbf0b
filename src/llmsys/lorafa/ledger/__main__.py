"""`python -m llmsys.lorafa.ledger [FOLDER]`: the tables of all ledger records under a folder."""

from __future__ import annotations

from llmsys import results
from llmsys.job import Record
from llmsys.lorafa.ledger import tables


def table(record: Record) -> str:
    return tables.markdown(record.summary, str(record.config["model"]["name"]))


if __name__ == "__main__":
    results.print_tables("lorafa_ledger", "llmsys.lorafa.ledger", table)
