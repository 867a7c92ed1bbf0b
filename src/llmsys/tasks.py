"""Which function runs a task: a name from the config to code that is imported only when it is run."""

from __future__ import annotations

import importlib
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from llmsys.job import Record

TASKS = {
    "train": "llmsys.train.task:train",
    "lorafa_ledger": "llmsys.lorafa.ledger.task:ledger",
    "compress_simulate": "llmsys.compress.simulate.task:simulate",
    "compress_iteration": "llmsys.compress.measure.task:iteration",
    "compress_replay": "llmsys.compress.measure.task:replay",
    "bench_advise": "llmsys.bench.advise.task:advise",
    "bench_opportunities": "llmsys.bench.opportunities.task:opportunities",
    "bench_modules": "llmsys.bench.modules.task:modules",
    "bench_ops": "llmsys.bench.ops.task:ops",
    "bench_serve": "llmsys.bench.serve.task:serve",
    "bench_serve_modules": "llmsys.bench.serve.phases_task:modules",
    "bench_predict": "llmsys.bench.predict.task:predict",
    "bench_calibrate": "llmsys.bench.predict.calibrate:calibrate",
    "decentral_plan": "llmsys.decentral.plan_task:plan",
    "decentral_perf": "llmsys.decentral.perf_task:compare",
    "decentral_simulate": "llmsys.decentral.simulate_task:simulate",
    "decentral_profile": "llmsys.decentral.profile_task:profile",
    "decentral_train": "llmsys.decentral.train_task:train",
    "decentral_finetune": "llmsys.decentral.train_task:train",
    "decentral_generate": "llmsys.decentral.generate_task:generate",
    "decentral_attack": "llmsys.decentral.attack_task:attack",
}
"""`task.kind` -> module:function. A task takes (config, context) and returns what goes into the record."""
LIGHT = ("bench_predict", "bench_advise")
"""Tasks that need neither torch nor ranks: they are run in the process that has composed them, with a `LightContext`,
and are done in seconds. Their tables are the answer, and printed first."""
QUESTIONS = (*LIGHT, "decentral_plan", "decentral_perf", "decentral_simulate", "decentral_profile")
"""Tasks that are about a model and train none."""

MONOTONE = {
    "train": (
        *("train.micro_batch", "train.global_batch", "train.length", "train.target_length", "train.steps"),
        *("model.num_layers", "model.hidden_size", "model.intermediate_size", "model.vocab_size"),
        *("model.num_heads", "model.num_kv_heads", "method.r", "dispatch.memory_gib"),
    ),
}
"""`task.kind` -> settings along which, all else equal, a run's memory never shrinks: `llmsys.sweep.prune` says what of
each is compared. A task that is not here has none."""


TABLES = {
    "lorafa_ledger": "llmsys.lorafa.ledger",
    "compress_simulate": "llmsys.compress.simulate",
    "compress_iteration": "llmsys.compress.measure",
    "compress_replay": "llmsys.compress.measure",
}
"""`task.kind` -> package that makes tables of such a task's record: as a program, and by `table` of its `__main__`. No
common table has columns for these numbers; they are of many methods, so the run has none."""


def check(kind: str) -> None:
    """ValueError, listing the tasks there are, if `kind` is none; imports nothing."""
    if kind not in TASKS:
        raise ValueError(f"task.kind={kind}: must be one of {', '.join(TASKS)}")


def find(kind: str) -> Callable[..., dict[str, Any]]:
    """The task's function; ValueError lists the tasks there are."""
    check(kind)
    module, _, name = TASKS[kind].partition(":")
    function: Callable[..., dict[str, Any]] = getattr(importlib.import_module(module), name)
    return function


SCRIPTS = "benchmark"
"""The task of records that a script of `benchmarks/` has left: each has numbers of its own."""


def has_tables(record: Record) -> bool:
    """Whether a record is of numbers with tables of their own."""
    return record.task in (*TABLES, SCRIPTS) and record.status == "ok"


def table(record: Record) -> str:
    """These tables; of a script's record its numbers, a line each."""
    if record.task == SCRIPTS:
        lines = [f"| {record.name} {record.run_id} | |", "|---|---:|"]
        return "\n".join([*lines, *(f"| {key} | {value:,.6g} |" for key, value in record.summary.items()), ""])
    made: str = importlib.import_module(f"{TABLES[record.task]}.__main__").table(record)
    return made
