"""The task `bench_predict`."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from llmsys import schema
from llmsys.cost import case, memory

if TYPE_CHECKING:
    from llmsys.context import LightContext


def predict(config: schema.Config, context: LightContext) -> dict[str, Any]:
    """The record's summary, and `prediction.md` with its tables."""
    parts = (config.model, config.train, config.method, config.engine)
    known = case.facts(config, "cuda")
    peak = memory.peak_bytes(*parts, **known)
    text = f"{memory.estimate(*parts, **known)} {peak / 2**30}"
    (context.out / "prediction.md").write_text(text, encoding="utf-8")
    return {"summary": {"predicted_peak_gib": peak / 2**30}, "files": {"tables": "prediction.md"}}
