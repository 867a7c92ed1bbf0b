"""The task `bench_modules`: the trainer's own steps, and how long each module takes in them."""

from __future__ import annotations

import dataclasses
import statistics
from typing import TYPE_CHECKING, Any

import torch

from llmsys import schema
from llmsys.bench.modules import figures, tables
from llmsys.bench.modules.arms import Arms
from llmsys.bench.modules.figures import ARMS, PHASES
from llmsys.cost import modules as costs
from llmsys.train import checks, peaks
from llmsys.train.task import trainer

if TYPE_CHECKING:
    from llmsys.context import Context
    from llmsys.train.loop import Loop


def modules(config: schema.Config, context: Context) -> dict[str, Any]:
    """Trains for `task.rounds` steps of each kind (see `arms`) at a constant rate; every rank measures, and the first
    one's numbers are the record's. Raises what training does."""
    task = config.task
    assert isinstance(task, schema.Modules)
    rounds = task.warmup + task.rounds
    train = dataclasses.replace(config.train, steps=rounds * len(ARMS), schedule="constant")
    with trainer(dataclasses.replace(config, train=train), context) as ready:
        loop = ready.loop
        arms = Arms(loop, task.warmup)
        arms.run(rounds, context.beat)
        rows = arms.modules.rows()
        times = [
            (row, kind or "other", statistics.median(ms)) for row, each in rows.items() for kind, ms in each.items()
        ]
        context.table("module_times", ("row", "phase", "ms_p50"), times)
        peak = peaks.peak_flops(loop.config, context.device)
        summary = {
            **figures.modules(rows, _products(loop, context.device), peak.per_s),
            **figures.overheads(arms.step_ms),
            **loop.sizes,
            "samples_per_s": train.global_batch / statistics.median(arms.step_ms[PHASES]) * 1e3,
            "peak_measured": int(peak.measured),
            "cuts_per_step": arms.modules.cuts,
            **ready.predicted,
        }
        notes = ["what each row has: llmsys.profile.taxonomy", f"peak: {peak.source}", *_notes(list(rows), loop)]
        kernel = _kernel(loop)
    if context.place.rank == 0:
        text = tables.markdown(summary, config.model.name, notes)
        (context.out / "modules.md").write_text(text, encoding="utf-8")
    samples = {f"modules/{row}/{kind or 'other'}_ms": ms for row, kinds in rows.items() for kind, ms in kinds.items()}
    samples |= {f"{arm}_step_ms": ms for arm, ms in arms.step_ms.items()}
    return {
        "summary": summary,
        "samples": samples,
        "notes": {"peak_tflops": peak.source},
        "files": {"tables": "modules.md"},
        "kernel": kernel,
        "data_hash": ready.data_hash,
    }


def _products(loop: Loop, device: torch.device) -> dict[str, costs.Flops]:
    config = loop.config
    parts = config.model, config.train, config.method, config.engine
    return costs.by_module(*parts, **checks.facts(config, device))


def _kernel(loop: Loop) -> str:
    from llmsys.models import kernel

    batch = {key: value.to(loop.device) for key, value in loop.micro_batches(0)[0].items()}
    with loop.mixed():
        return kernel.observed(loop.model, batch)


def _notes(rows: list[str], loop: Loop) -> list[str]:
    """What a reader of the table has to know of its rows."""
    found = []
    if "block" in rows:
        found.append(
            f"block: method={loop.config.method.kind} runs blocks as chains of fused functions, whose modules are not "
            "called: norms, projections, rotation and MLP are one row; what they compute again is in its backward"
        )
    if "logits+loss" in rows:
        found.append("logits+loss: train.loss=chunked makes the loss and its gradients in the head's forward pass")
    if loop.engine.world > 1:
        found.append("of rank 0; communication, backward: waiting for gradients behind the last module")
    return found
