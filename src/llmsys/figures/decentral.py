"""The figures of `decentral` from a list of records."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from llmsys.decentral import pictures
from llmsys.job import Record

Drawn = tuple[Any, Sequence[Record]]


def over_lines(records: Sequence[Record]) -> Drawn:
    found = [record for record in records if record.task == "decentral_perf" and record.status == "ok"]
    return pictures.over_lines(found), found


def timeline(records: Sequence[Record]) -> Drawn:
    """Of the first plan."""
    found = [record for record in records if "gantt/stage" in record.samples]
    if not found:
        raise ValueError("no record of a plan: python -m llmsys +exp=decentral_plan")
    return pictures.of_record(found[0]), found[:1]


def against(records: Sequence[Record]) -> Drawn:
    """Of the first record of benchmarks/decentral_plans.py."""
    found = [record for record in records if any(key.endswith("/baseline_per_s") for key in record.samples)]
    if not found:
        raise ValueError("no record of plans beside baselines: python benchmarks/decentral_plans.py")
    return pictures.against(found[0]), found[:1]


def goodput(records: Sequence[Record]) -> Drawn:
    found = [record for record in records if record.task == "decentral_simulate" and record.status == "ok"]
    if not found:
        raise ValueError("no record of a simulation: python -m llmsys +exp=decentral_simulate_churn")
    return pictures.goodput(found), found
