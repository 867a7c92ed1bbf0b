"""The task `bench_predict`.

The summary's keys: `predicted_peak_gib`, `predicted_step_ms`, `predicted_tokens_per_s`, `predicted_samples_per_s`,
`predicted_mfu`, `predicted_host_gib` (all ranks of a machine), `fits` (0 or 1), `capacity_gib`, of memory
`<phase>/device_gib` and `<phase>/<kind>_gib`, of time `<phase>_ms`, and `spent/<on what>_ms`. `notes` say what binds
and how the numbers were made.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from llmsys import schema
from llmsys.bench.predict import machine as machines
from llmsys.bench.predict import prediction, tables
from llmsys.bench.predict.prediction import Prediction
from llmsys.cost.room import GIB

if TYPE_CHECKING:
    from llmsys.context import LightContext


def predict(config: schema.Config, context: LightContext) -> dict[str, Any]:
    """The record's summary, and `prediction.md` with its tables. ValueError as of `prediction.predict`."""
    machine = machines.of(config)
    found = prediction.predict(config, machine)
    (context.out / "prediction.md").write_text(tables.markdown(config, machine, found), encoding="utf-8")
    notes = {"binds": found.binds, "made": found.note}
    return {"summary": summary(found), "notes": notes, "files": {"tables": "prediction.md"}}


def summary(found: Prediction) -> dict[str, float]:
    """As a record has it."""
    values = {
        "predicted_peak_gib": found.peak_bytes / GIB,
        "predicted_step_ms": found.step_ms,
        "predicted_tokens_per_s": found.tokens_per_s,
        "predicted_samples_per_s": found.samples_per_s,
        "predicted_mfu": found.mfu,
        "predicted_host_gib": found.host_bytes / GIB,
        "capacity_gib": found.capacity_bytes / GIB,
        "fits": int(found.fits),
    }
    if found.host_capacity_bytes is not None:
        values["host_capacity_gib"] = found.host_capacity_bytes / GIB
    if found.usd_per_million_tokens is not None:
        values["usd_per_million_tokens"] = found.usd_per_million_tokens
    for phase in found.phases:
        values[f"{phase.name}/device_gib"] = phase.device_bytes / GIB
        values |= {f"{phase.name}/{kind}_gib": nbytes / GIB for kind, nbytes in phase.device.items()}
        if phase.host_bytes:
            values[f"{phase.name}/host_gib"] = phase.host_bytes / GIB
    values |= {f"{name}_ms": ms for name, ms in found.by_phase_ms.items()}
    return values | {f"spent/{what}_ms": ms for what, ms in found.spent_ms.items()}
