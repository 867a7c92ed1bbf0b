"""How far each module of a step is from the least time that it could take, and so how much of the step could be saved.

The roofline of a pass over a row is the longer one of its arithmetic at the device's peak and of its bytes (`least`) at
the speed of its memory; of a row the sum over its passes. With s the row's share of the step,

    headroom = s (measured - roofline) / measured

the share of the step that would go if the row ran on its roofline, and nothing else changed. It is an upper bound of
what any change to that row alone can save: peaks are never reached. A row whose work is not known has no roofline; one
that is faster than it (a datasheet's or a measured peak, caches in place of memory) has no headroom.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from llmsys.bench.modules import tables as modules
from llmsys.bench.opportunities.least import Bytes
from llmsys.profile.taxonomy import KINDS

CAUSAL = 0.5
"""Of the whole square, which is counted, a fused causal kernel may skip half."""


@dataclass(frozen=True, kw_only=True)
class Opportunity:
    """A row of the step: `ms` measured, `bound_ms` its roofline (None: not known), and what that is bound by."""

    row: str
    ms: float
    share_percent: float
    bound_ms: float | None
    by: str = ""

    @property
    def headroom_percent(self) -> float:
        """Of the step; 0 where no roofline is known."""
        if self.bound_ms is None or self.ms <= 0:
            return 0.0
        return self.share_percent * max(0.0, self.ms - self.bound_ms) / self.ms


def ranking(
    summary: Mapping[str, float],
    least: Mapping[str, Bytes],
    *,
    flops_per_s: float,
    bytes_per_s: float,
    causal: bool = False,
) -> list[Opportunity]:
    """Of the summary of a run of `bench_modules`; the most headroom first, and last what has no roofline, the longest
    first. `causal`: attention need not look at what comes later."""
    found = []
    rows = modules.rows(summary)
    total = sum(summary[f"modules/{row}/ms"] for row in rows)
    for row in rows:
        ms = summary[f"modules/{row}/ms"]
        bound, by = _bound(summary, row, least.get(row), flops_per_s, bytes_per_s, causal)
        found.append(Opportunity(row=row, ms=ms, share_percent=100 * ms / total, bound_ms=bound, by=by))
    return sorted(found, key=lambda each: (each.bound_ms is None, -each.headroom_percent, -each.ms))


def _bound(
    summary: Mapping[str, float],
    row: str,
    least: Bytes | None,
    flops_per_s: float,
    bytes_per_s: float,
    causal: bool,
) -> tuple[float | None, str]:
    """(ms, `compute` or `memory`, whichever takes more of them)."""
    skip = CAUSAL if causal and row == "attention" else 1.0
    compute = {kind: summary.get(f"modules/{row}/{kind}_flops", 0.0) * skip / flops_per_s for kind in KINDS}
    memory = dict(zip(KINDS, least or Bytes(), strict=True))
    memory = {kind: nbytes / bytes_per_s for kind, nbytes in memory.items()}
    if not any(compute.values()) and not any(memory.values()):
        return None, ""
    bound = sum(max(compute[kind], memory[kind]) for kind in KINDS)
    by_compute = sum(compute[kind] for kind in KINDS if compute[kind] >= memory[kind])
    return 1e3 * bound, "compute" if by_compute >= bound / 2 else "memory"
