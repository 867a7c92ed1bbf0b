"""Plans and comparisons as Markdown."""

from __future__ import annotations

import itertools
from collections.abc import Mapping

from llmsys.decentral.cost import Cost, Costs
from llmsys.decentral.fleet import GIB
from llmsys.decentral.order import Pipeline
from llmsys.decentral.plan import Plan
from llmsys.table import piped

MOST = 4
"""Pipelines that are shown stage by stage; `plan.json` has all."""
COLUMNS = ("stage", "provider", "region", "operators", "computes ms", "sends ms", "receives ms", "memory GiB", "of")


def plan(costs: Costs, found: Plan, densities: Mapping[tuple[int, int], float]) -> str:
    """The answer in a line, then each pipeline's stages; the slowest of three times of a stage is bold where it sets
    the pace of its pipeline."""
    lines = [headline(costs, found), ""]
    for at, (each, share) in enumerate(zip(found.pipelines[:MOST], found.score.shares, strict=False)):
        if len(found.pipelines) > 1:
            lines += [f"### Replica {at}, {share} of {costs.work.micro_batches} micro-batches", ""]
        lines += [*piped(COLUMNS, _stages(costs, each)), ""]
    if len(found.pipelines) > MOST:
        lines += [f"{len(found.pipelines) - MOST} more replicas stand in plan.json.", ""]
    if found.spares:
        names = [costs.fleet.providers[p].name for p in found.spares]
        more = f" and {len(names) - 12} more" if len(names) > 12 else ""
        lines += [f"Spares: {', '.join(names[:12])}{more}.", ""]
    if densities:
        names = [each.name for each in costs.fleet.providers]
        rows = [[names[p], names[q], f"{100 * each:.3g} %"] for (p, q), each in densities.items()]
        lines += ["Top-k on lines, the others whole:", "", *piped(("from", "to", "elements sent"), rows), ""]
    return "\n".join(lines).rstrip() + "\n"


def headline(costs: Costs, found: Plan) -> str:
    """What comes out."""
    tokens, score = costs.chain.tokens, found.score
    lengths = [len(each.order) for each in found.pipelines]
    if found.objective == "latency":
        what = f"one micro-batch of {tokens} tokens in {seconds(score.step_s)}"
        return f"**{what}** through {lengths[0]} providers of {len(costs.fleet)}"
    stages = str(lengths[0]) if len(set(lengths)) == 1 else f"{min(lengths)} to {max(lengths)}"
    pipelines = (
        f"{len(lengths)} replicas of {stages} stages" if len(lengths) > 1 else f"one pipeline of {stages} stages"
    )
    each = f"{found.per_s * tokens:,.4g} tokens/s, {found.per_s:,.4g} micro-batches/s"
    step = ""
    if costs.work.train:
        sync = f", {seconds(score.sync_s)} of it to add up gradients" if score.sync_s else ""
        step = f"; a step of {costs.work.micro_batches} micro-batches takes {seconds(score.step_s)}{sync}"
    return f"**{pipelines}: {each}** on {sum(lengths)} of {len(costs.fleet)} providers{step}"


def seconds(value: float) -> str:
    """In a unit that suits it."""
    return f"{value:,.3g} s" if value >= 1 else f"{value * 1e3:,.3g} ms"


def _stages(costs: Costs, each: Pipeline) -> list[list[str]]:
    stages = costs.stages(each.order, each.cuts)
    assert stages is not None, "a pipeline of a plan"
    slowest = max(stage.slowest_s for stage in stages)
    rows = []
    for at, (p, cost) in enumerate(zip(each.order, stages, strict=True)):
        provider = costs.fleet.providers[p]
        times = [_time(value, slowest) for value in (cost.compute_s, cost.send_s, cost.receive_s)]
        span = _span(costs, *each.cuts[at : at + 2])
        rows.append([str(at), provider.name, provider.region, span, *times, _memory(cost), f"{provider.mem_gib:.2f}"])
    return rows


def _time(seconds: float, slowest: float) -> str:
    text = f"{seconds * 1e3:,.4g}"
    return f"**{text}**" if seconds == slowest else text


def _memory(cost: Cost) -> str:
    host = f" + {cost.host_bytes / GIB:.2f} on the host" if cost.host_bytes else ""
    return f"{cost.device_bytes / GIB:.2f}{host}"


def _span(costs: Costs, begin: int, end: int) -> str:
    """By the layers where they are known, by operators else."""
    blocks = [block for block, _ in itertools.groupby(costs.chain.blocks[begin:end]) if block]
    if not blocks:
        return f"{begin} to {end - 1}"
    first, last = blocks[0], blocks[-1]
    return f"{end - begin}: {first}" + (f" to {last}" if last != first else "")
