"""AdaTopK: what crosses the slowest line is thinned out most, and what crosses fast ones is left whole.

FusionLLM (arXiv 2410.12707) compresses activations and gradients "adaptively", most at the slowest links; how exactly
could not be read, so this is a reconstruction. With the density d for the slowest line, one whose messages take the
share s of the slowest's time keeps d / s of their elements, at most all: after it no line takes longer than that one.
Top-k sends a value in fp32 and a place in int32, 8 bytes, of each element that it keeps (`llmsys.compress.encode`), so
that thinning a line by less than half, or of a quarter in bf16, would make messages longer: such lines are left whole.
What is left out is not sent later, as it is of gradients in data parallelism: an activation's error belongs to its
sample, and the next one is another.
"""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Mapping
from typing import TYPE_CHECKING

from llmsys.decentral.cost import Costs
from llmsys.decentral.known import Known
from llmsys.decentral.plan import Plan, Planner

if TYPE_CHECKING:
    from llmsys.compress import CompressConfig

KEPT_BYTES = 8
"""Of an element that is sent."""

Lines = Mapping[tuple[int, int], float]
"""By sender and receiver, places in the fleet."""


def line_seconds(costs: Costs, plan: Plan) -> dict[tuple[int, int], float]:
    """What a micro-batch keeps each line between stages busy for, uncompressed."""
    found = {}
    for order, cuts, _ in plan.pipelines:
        for cut, (p, q) in zip(cuts[1:-1], itertools.pairwise(order), strict=True):
            found[p, q] = float(costs.ahead[cut]) * costs.fleet.beta_s(p, q)
            if costs.work.train:
                found[q, p] = float(costs.back[cut]) * costs.fleet.beta_s(q, p)
    return {line: seconds for line, seconds in found.items() if seconds}


def densities(seconds: Lines, density: float, width: int) -> dict[tuple[int, int], float]:
    """The share of elements that each line keeps, of elements of `width` bytes; those that are left whole are left out.
    ValueError for a density outside (0, 1]."""
    if not 0 < density <= 1:
        raise ValueError(f"density={density}: must lie in (0, 1]")
    slowest = max(seconds.values(), default=0.0)
    wanted = {line: density * slowest / each for line, each in seconds.items()}
    return {line: each for line, each in wanted.items() if each * KEPT_BYTES < width}


def factor(density: float, width: int) -> float:
    """Bytes of a message over those of the whole tensor."""
    return density * KEPT_BYTES / width


def compressed(planner: Planner, plan: Plan, density: float, width: int) -> tuple[Planner, Plan, Lines]:
    """(a planner that knows, the plan with its orders cut anew for the lines as they now are, densities by line)."""
    kept = densities(line_seconds(planner.costs, plan), density, width)
    factors = {line: factor(each, width) for line, each in kept.items()}
    other = Planner(dataclasses.replace(planner.costs, factors=factors, known=Known()), planner.objective)
    again = [other.finder.cut(each.order) for each in plan.pipelines]
    return other, other.made([each for each in again if each is not None]), kept


def config(density: float) -> CompressConfig:
    """For `llmsys.compress.encode`: a message with this share of its elements."""
    from llmsys.compress import CompressConfig

    return CompressConfig(method="topk", density=density)
