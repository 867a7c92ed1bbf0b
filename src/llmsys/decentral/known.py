"""What has been computed of providers and pipelines, by their places in a fleet: a part of no result."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from llmsys.decentral.chain import Numbers

if TYPE_CHECKING:
    from llmsys.decentral.cost import Cost
    from llmsys.decentral.pace import Pace

Laid = tuple[tuple[int, ...], tuple[int, ...]]
"""(providers, cuts)."""


@dataclass(kw_only=True, eq=False)
class Known:
    """Of one chain, one workload and one share that is sent over each line; good as long as nobody's place is
    another's, whoever comes or goes. `memory`: bytes up to each position, by what is kept and bytes for a byte of
    weights. `lines`: seconds a byte. `stages`: None of a pipeline that cannot be. `sums`: of gradients from one
    pipeline to another, (seconds, latency). `rings`: of regions."""

    memory: dict[tuple[float, float], Numbers] = field(default_factory=dict)
    lines: dict[tuple[int, int], float] = field(default_factory=dict)
    stages: dict[Laid, list[Cost] | None] = field(default_factory=dict)
    paces: dict[Laid, Pace] = field(default_factory=dict)
    sums: dict[tuple[Laid, Laid], tuple[float, float]] = field(default_factory=dict)
    rings: dict[frozenset[str], list[str]] = field(default_factory=dict)
