"""What a published number can be: its units, and the same number of one of our cells."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from llmsys.bench.cells import Cell
from llmsys.profile.taxonomy import BACKWARD, FORWARD, PHASES, ROWS

TOKENS = {"tokens/s": 1.0}
BYTES = {"GB": 1e9, "GiB": 2.0**30, "MB": 1e6, "MiB": 2.0**20}
MS = {"ms": 1.0, "s": 1e3, "us": 1e-3}
PERCENT = {"%": 1.0}
EXAMPLES = {"examples": 1.0}
TOGETHER = {"mlp": ("gate", "up", "activation", "down"), "attention": ("attention", "scores", "softmax", "context")}
"""Rows of a paper that are several of ours. Of `attention` there is either the fused one or eager's three steps."""
MODULES = tuple(dict.fromkeys((*ROWS, *TOGETHER, *PHASES)))

Value = Callable[[Cell], float | None]


@dataclass(frozen=True, kw_only=True)
class Quantity:
    """`units`: by how much each is of ours (bytes, ms, percent, tokens/s). `value` of a cell in that; None where it has
    none. A `share` is compared by difference, all else by ratio."""

    name: str
    units: dict[str, float]
    value: Value
    share: bool = False


def _summary(key: str, scale: float = 1.0) -> Value:
    def value(cell: Cell) -> float | None:
        found = cell.of(key)
        return None if found is None else found.mean * scale

    return value


def _memory(cell: Cell) -> float | None:
    return cell.memory.mean if cell.memory else None


def _batch(cell: Cell) -> float | None:
    return float(cell.batch) if cell.ok else None


def _nowhere(cell: Cell) -> float | None:
    """Of the scaling efficiency, which no single cell has: see `compare`."""
    return None


LARGEST, EFFICIENCY = "largest_batch", "scaling_efficiency"
QUANTITIES = {
    each.name: each
    for each in (
        Quantity(name="throughput", units=TOKENS, value=_summary("tokens_per_s")),
        Quantity(name="peak_memory", units=BYTES, value=_memory),
        Quantity(name="device_memory", units=BYTES, value=_summary("device_gib", 2.0**30)),
        Quantity(name="host_memory", units=BYTES, value=_summary("host_peak_gib", 2.0**30)),
        *(
            Quantity(name=phase, units=MS, value=_summary(f"{phase}_ms_p50"))
            for phase in ("step", "data", "forward", "backward", "communication", "optimizer")
        ),
        Quantity(name="mfu", units=PERCENT, value=_summary("mfu", 100.0), share=True),
        Quantity(name="hfu", units=PERCENT, value=_summary("hfu", 100.0), share=True),
        Quantity(name=LARGEST, units=EXAMPLES, value=_batch),
        Quantity(name=EFFICIENCY, units=PERCENT, value=_nowhere, share=True),
    )
}
"""Of a step; `peak_memory` of one rank, as in the report."""
OF_MODULES = ("forward", "backward", "forward_share", "backward_share", "step", "step_share")
"""Of a module: ms of a pass, or of all that it has of a step, and the share of that in percent."""


def of_module(name: str, module: str) -> Quantity:
    """One of `OF_MODULES` for a row of `MODULES`."""
    share = name.endswith("_share")
    kind = name.removesuffix("_share")
    return Quantity(
        name=name, units=PERCENT if share else MS, value=lambda cell: _module(cell, module, kind, share), share=share
    )


def _module(cell: Cell, module: str, kind: str, share: bool) -> float | None:
    summary = cell.record.summary
    end = "ms" if kind == "step" else f"{kind}_ms"
    keys = [f"modules/{row}/{end}" for row in TOGETHER.get(module, (module,))]
    if not any(key in summary for key in keys):
        return None
    found = sum(summary.get(key, 0.0) for key in keys)
    if not share:
        return found
    every = sum(value for key, value in summary.items() if key.startswith("modules/") and key.endswith(f"/{end}"))
    return 100 * found / every


assert {FORWARD, BACKWARD} <= set(OF_MODULES)
