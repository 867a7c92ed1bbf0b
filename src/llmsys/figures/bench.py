"""The figures of `bench` from a list of records: the charts of its report, of the workload with most cells."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from llmsys.bench import workloads
from llmsys.bench.report import pictures
from llmsys.bench.serve import pictures as serving
from llmsys.bench.workloads import Workload
from llmsys.job import Record

Drawn = tuple[Any, Sequence[Record]]


def _workload(records: Sequence[Record]) -> Workload:
    found = workloads.workloads(records)
    if not found:
        raise ValueError("no record of training: python -m llmsys sweep=bench_pretrain_grid")
    return found[0]


def _of(workload: Workload) -> list[Record]:
    return [record for cell in workload.measured for record in cell.records]


def pareto(records: Sequence[Record]) -> Drawn:
    workload = _workload(records)
    return pictures.over_memory(workload), _of(workload)


def letters(records: Sequence[Record]) -> Drawn:
    workload = _workload(records)
    return pictures.letters(workload), _of(workload)


def phases(records: Sequence[Record]) -> Drawn:
    workload = _workload(records)
    return pictures.phases(workload), _of(workload)


def predicted(records: Sequence[Record]) -> Drawn:
    workload = _workload(records)
    return pictures.predicted(workload, records), _of(workload)


def modules(records: Sequence[Record]) -> Drawn:
    """Of the first record of bench_modules."""
    timed = [record for record in records if record.task == "bench_modules" and record.status == "ok"]
    if not timed:
        raise ValueError("no record of bench_modules: python -m llmsys +exp=bench_modules")
    return pictures.modules(timed[0]), timed[:1]


def latencies(records: Sequence[Record]) -> Drawn:
    served = serving.same_load(records)
    return serving.latencies(served), served


def throughput(records: Sequence[Record]) -> Drawn:
    served = serving.same_load(records)
    return serving.throughput(served), served
