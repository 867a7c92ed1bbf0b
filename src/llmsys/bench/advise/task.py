"""The task `bench_advise`."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

from llmsys import schema
from llmsys.bench.advise import emit, measured, space, tables
from llmsys.bench.advise.cells import GIB, Cell, Predict, Predicted
from llmsys.bench.advise.ranking import Answer, answer
from llmsys.files import write_atomic

if TYPE_CHECKING:
    from llmsys.context import LightContext


def advise(config: schema.Config, context: LightContext) -> dict[str, Any]:
    """The record of the answer, with `advice.md`, `advice.json` (every cell that was looked at) and, in `task.emit`,
    what to run. ValueError where nothing can be chosen among or predicted."""
    if space.advise(config).goal == "serve":
        from llmsys.bench.serve import advised as serving

        return serving.advised(config, context)
    from llmsys.bench.predict import machine as machines
    from llmsys.bench.predict import predict

    known = {config.train.world: machines.of(config)}

    def predicted(wanted: schema.Config) -> Predicted:
        world = wanted.train.world
        if world not in known:
            known[world] = machines.of(wanted)
        return predict(wanted, known[world])

    here = known[config.train.world]
    return advised(config, context, predicted, machine=here.title, cuda=here.device == "cuda")


def advised(
    config: schema.Config, context: LightContext, predict: Predict, *, machine: str, cuda: bool
) -> dict[str, Any]:
    """As `advise`, by any prediction. `machine` in words; `cuda`: its devices are GPUs."""
    task = space.advise(config)
    root = context.inputs.get("records")
    made = answer(config, predict, measured.read(config, Path(root) if root else None))
    written = []
    if task.emit:
        found = emit.files(config, made.choice, cuda=cuda) if made.ranking else emit.Emitted(texts={}, why_not={})
        emit.write(found, Path(task.emit).expanduser())
        names = ", ".join(found.texts)
        written = [f"to run: {names} in {task.emit}" if names else f"nothing to run stands in {task.emit}"]
        written += [f"no {name}: {why}" for name, why in found.why_not.items()]
    text = tables.markdown(made, config, machine, written)
    (context.out / "advice.md").write_text(text, encoding="utf-8")
    write_atomic(context.out / "advice.json", json.dumps(plain(made), indent=1) + "\n")
    return {
        "summary": summary(made),
        "notes": notes(made),
        "files": {"tables": "advice.md", "cells": "advice.json"},
    }


def summary(made: Answer) -> dict[str, float]:
    """`fits` is 1 where anything does; the numbers of the choice, predicted ones with a prefix that says so."""
    choice = made.choice
    prefix = "" if choice.measured else "predicted_"
    found: dict[str, float] = {
        "fits": int(bool(made.ranking)),
        "combinations": len(made.ranking) + len(made.short),
        "combinations_that_fit": len(made.ranking),
        "combinations_left_out": len(made.left_out),
        "measured_combinations": sum(cell.measured for cell in (*made.ranking, *made.short)),
        "micro_batch": choice.micro_batch,
        "devices": choice.world,
        "capacity_gib": choice.capacity_bytes / GIB,
        "device_hours_per_million_tokens": choice.device_hours,
        f"{prefix}tokens_per_s": choice.tokens_per_s,
        f"{prefix}peak_gib": choice.peak_bytes / GIB,
        ("step_ms_p50" if choice.measured else "predicted_step_ms"): choice.step_ms,
    }
    if choice.usd is not None:
        found["usd_per_million_tokens"] = choice.usd
    if made.margin_percent is not None:
        found["margin_percent"] = made.margin_percent
    for drop in made.drops:
        if drop.cell is not None and drop.cell.fits and made.ranking:
            found[f"without/{drop.letter}/tokens_per_s"] = drop.cell.tokens_per_s
            found[f"without/{drop.letter}/peak_gib"] = drop.cell.peak_bytes / GIB
    return found


def notes(made: Answer) -> dict[str, str]:
    """The answer in words, under the keys of the summary where there is one."""
    found = {"choice": str(made.choice.techniques), "binds": made.choice.binds}
    if made.runner_up is not None:
        found["margin_percent"] = f"to {made.runner_up}"
    if made.bound:
        found["micro_batch"] = f"bounded by {made.bound}"
    if made.choice.measured:
        found["tokens_per_s"] = f"measured in {', '.join(made.choice.runs)}; padding counts"
    if made.choice.correction != 1:
        found["predicted_tokens_per_s"] = (
            f"{made.choice.correction:.2f} times the prediction, as runs of others suggest"
        )
    return found


def plain(made: Answer) -> dict[str, Any]:
    """All of it as JSON."""
    return {
        "goal": made.goal,
        "stage": made.stage,
        "bound": made.bound,
        "unlike": made.unlike,
        "ranking": [_plain(cell) for cell in made.ranking],
        "short": [_plain(cell) for cell in made.short],
        "drops": [
            {
                "letter": drop.letter,
                "techniques": drop.techniques,
                "why": drop.why,
                "cell": _plain(drop.cell) if drop.cell else None,
            }
            for drop in made.drops
        ],
        "left_out": list(made.left_out),
    }


def _plain(cell: Cell) -> dict[str, Any]:
    return {**dataclasses.asdict(cell), "techniques": str(cell.techniques)}
