"""The figures of `lorafa` from a list of records: its ledger's, and the comparison of methods."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from llmsys.job import Record
from llmsys.lorafa import quality as compared
from llmsys.lorafa.ledger import figures

Drawn = tuple[Any, Sequence[Record]]


def _ledger(records: Sequence[Record]) -> list[Record]:
    return [record for record in records if record.task == "lorafa_ledger" and record.status == "ok"]


def blocks(records: Sequence[Record]) -> Drawn:
    """One model of each family, for bytes over the width hardly depend on it."""
    found = figures.smallest_of_families(_ledger(records))
    return figures.blocks(found), found


def saved(records: Sequence[Record]) -> Drawn:
    return figures.whole(_ledger(records), "saved"), _ledger(records)


def peak(records: Sequence[Record]) -> Drawn:
    return figures.whole(_ledger(records), "peak"), _ledger(records)


def quality(records: Sequence[Record]) -> Drawn:
    found = compared.comparisons(records)
    return compared.over_memory(found), [record for each in found for record in each.records]


def rates(records: Sequence[Record]) -> Drawn:
    found = compared.comparisons(records)
    return compared.over_rates(found), [record for each in found for record in each.records]
