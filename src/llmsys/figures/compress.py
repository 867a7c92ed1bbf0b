"""The figures of `compress` from a list of records."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from llmsys.compress import pictures
from llmsys.job import Record

Drawn = tuple[Any, Sequence[Record]]


def iterations(records: Sequence[Record]) -> Drawn:
    """By ranks and the link's rate, the fullest last of each."""
    found = [record for record in records if record.name == "compress_iteration" and record.status == "ok"]
    found.sort(key=lambda record: (record.world, record.config["network"]["up_mbit"]))
    return pictures.breakdown(found), found


def ablation(records: Sequence[Record]) -> Drawn:
    found = [record for record in records if record.name == "compress_ablation" and record.status == "ok"]
    return pictures.breakdown(found), found


def rates(records: Sequence[Record]) -> Drawn:
    """Of the first simulation."""
    found = [record for record in records if record.task == "compress_simulate" and record.status == "ok"]
    if not found:
        raise ValueError("no record of a simulation: python -m llmsys +exp=compress_simulate")
    return pictures.over_rate(found[0]), found[:1]


def convergence(records: Sequence[Record]) -> Drawn:
    """Of the comparison with most contestants."""
    found = [record for record in records if record.task == "benchmark" and "contestants" in record.config]
    if not found:
        raise ValueError("no record of a comparison: python benchmarks/compress_convergence.py --full")
    fullest = max(found, key=lambda record: len(record.config["contestants"]))
    return pictures.convergence(fullest), [fullest]
