"""The task `bench_advise` with `goal=serve`: its record, its tables, and what to run."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from llmsys import schema
from llmsys.bench.advise import emit
from llmsys.bench.serve import advice
from llmsys.files import write_atomic
from llmsys.table import piped

if TYPE_CHECKING:
    from llmsys.context import LightContext

ASSUMED = (
    f"Predicted from rooflines: kernels of decoding reach {advice.SHARE:.0%} of a memory's bandwidth, which is "
    "assumed, and products the share of their card's peak that is known; no engine's own time is in it."
)
MORE = {"measured": "No more were measured at a time.", "most": f"No more than {advice.MOST} are looked at."}
"""What else than a limit has ended the search, by `Choice.binds`."""
MEASURED = "Predicted from passes of this model that were measured there; no engine's own time is in it."


def advised(config: schema.Config, context: LightContext) -> dict[str, Any]:
    """`advice.md`, `advice.json`, `vllm_serve.sh` in `task.emit`. Where nothing serves the model so, `fits` is 0."""
    task = config.task
    assert isinstance(task, schema.Advise)
    speeds = context.inputs.get("speeds")
    made = advice.answer(config, None if speeds is None else Path(speeds))
    assumed = ASSUMED if speeds is None else MEASURED
    written = list[str]()
    if task.emit and made.ranking:
        texts = {"vllm_serve.sh": advice.vllm(made.ranking[0], config)}
        emit.write(emit.Emitted(texts=texts, why_not={}), Path(task.emit).expanduser())
        written = [f"to run: vllm_serve.sh in {task.emit}"]
    text = markdown(made, config, [*written, assumed])
    (context.out / "advice.md").write_text(text, encoding="utf-8")
    plain = {"goal": "serve", "ranking": [dataclasses.asdict(each) for each in made.ranking], "left_out": made.left_out}
    write_atomic(context.out / "advice.json", json.dumps(plain, indent=1) + "\n")
    files = {"tables": "advice.md", "cells": "advice.json"}
    summary: dict[str, float] = {
        "fits": int(bool(made.ranking)),
        "combinations": len(made.ranking) + len(made.left_out),
    }
    if not made.ranking:
        return {"summary": summary, "notes": {"assumed": assumed}, "files": files}
    best = made.ranking[0]
    summary |= {
        "devices": best.cards,
        "batch": best.batch,
        "predicted_tokens_per_s": best.tokens_per_s,
        "predicted_ttft_ms": best.ttft_ms,
        "predicted_tpot_ms": best.tpot_ms,
        "predicted_memory_gib": best.memory_gib,
    }
    notes = {"choice": f"{best.techniques} on {best.cards} x {best.title}", "binds": best.binds, "assumed": assumed}
    return {"summary": summary, "notes": notes, "files": files}


def markdown(made: advice.Answer, config: schema.Config, said: Sequence[str]) -> str:
    """The answer first; then all that serve the model, by tokens a second of a card; what does not; what is `said`."""
    task, name = config.task, config.model.name
    assert isinstance(task, schema.Advise)
    asked = f"{task.prompt_tokens} tokens in, {task.output_tokens} out"
    limits = [
        f"{what} in {ms:g} ms" for what, ms in (("first token", task.slo_ttft_ms), ("token", task.slo_tpot_ms)) if ms
    ]
    parts = [f"# Which hardware serves {name}: {', '.join([asked, *limits])}"]
    if made.ranking:
        best = made.ranking[0]
        parts.append(f"**{best.techniques} on {best.cards} x {best.title}**, {best.batch} requests at a time: "
                     f"{best.tokens_per_s:,.0f} tokens/s, of a card {best.tokens_per_s / best.cards:,.0f}. "
                     f"{MORE.get(best.binds, f'{best.binds} allows no more.')}")  # fmt: skip
        head = (
            "",
            "letters",
            "at a time",
            "first token ms",
            "per token ms",
            "tokens/s",
            "of a card",
            "GiB of a card",
            "$ a million tokens",
            "binds",
        )
        rows = [[f"{each.cards} x {each.title}", each.techniques, str(each.batch), f"{each.ttft_ms:.1f}",
                 f"{each.tpot_ms:.2f}", f"{each.tokens_per_s:,.0f}", f"{each.tokens_per_s / each.cards:,.0f}",
                 f"{each.memory_gib:.1f}", "" if each.usd_per_million is None else f"{each.usd_per_million:.2f}",
                 each.binds] for each in made.ranking]  # fmt: skip
        parts.append("\n".join(piped(head, rows)))
    else:
        parts.append("**Nothing that is known serves it so.**")
    if made.left_out:
        parts.append("\n".join(["Left out:", "", *(f"- {what}: {why}" for what, why in made.left_out)]))
    return "\n\n".join([*parts, *said]) + "\n"
