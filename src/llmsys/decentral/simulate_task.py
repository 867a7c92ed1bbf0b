"""The task `decentral_simulate`.

Keys of the summary, for each mean time between a provider's failures (in seconds), means over the runs:

    <mtbf>s/goodput_percent           micro-batches of committed steps, of those of the first plan with nobody ever gone
    <mtbf>s/tokens_per_s               of committed steps; of images, rows
    <mtbf>s/committed_steps, lost_steps    lost: under way when somebody went, and begun again
    <mtbf>s/wasted_percent, holding_percent, stuck_percent    of the time: lost steps, fetching stages, no plan
    <mtbf>s/found_ms_p50               from a silence until the silent were given up
    <mtbf>s/moved_gib                  weights and optimizer state that were fetched
    <mtbf>s/usd_per_million_tokens, joule_per_token           where prices and powers are known
    <mtbf>s/repairs/<how>              plans by how they were made

Samples have `goodput_percent/<mtbf>s` of each run. A run that breaks a promise ends the task with what it was.
"""

from __future__ import annotations

import statistics
from typing import TYPE_CHECKING, Any

from llmsys import schema
from llmsys.decentral import asked, plan_task
from llmsys.decentral.broker import Job
from llmsys.decentral.churn import Churn
from llmsys.decentral.fleet import GIB, Fleet
from llmsys.decentral.simulate import Outcome
from llmsys.decentral.simulate import simulate as run
from llmsys.files import write_atomic
from llmsys.schema.decentral import FLEETS
from llmsys.table import piped

if TYPE_CHECKING:
    from llmsys.context import Context


def simulate(config: schema.Config, context: Context) -> dict[str, Any]:
    """The record's summary and samples, and `simulate.md`. ValueError where the fleet cannot hold the model."""
    task = config.task
    assert isinstance(task, schema.DecentralSimulate)
    fleet = asked.fleet(config, context.inputs.get("fleet"))
    context.beat(phase="tracing the model")
    own = plan_task.chain(config)
    planner, _ = plan_task.planned(config, own, fleet)  # what cannot be held is said before anything is simulated
    job = Job(chain=own, work=planner.costs.work, between=fleet.between, other=fleet.other)
    summary: dict[str, float] = {}
    samples: dict[str, list[float]] = {}
    for mtbf in task.mtbf_s:
        churn = Churn(
            mtbf_s=mtbf,
            away_s=task.away_s,
            shares=(task.shares[0], task.shares[1], task.shares[2], task.shares[3]),
            hang_s=task.hang_s,
            slow_s=task.slow_s,
            slowdown=task.slowdown,
        )
        found = []
        for seed in range(task.runs):
            context.beat(phase=f"mtbf {mtbf:g} s, run {seed}")
            found.append(run(job, fleet, churn, task.hours * 3600, task.churn_seed + seed, task.begin or None))
        summary |= {f"{mtbf:g}s/{key}": value for key, value in _means(found, job, fleet).items()}
        samples[f"goodput_percent/{mtbf:g}s"] = [_goodput(each) for each in found]
    write_atomic(context.out / "simulate.md", markdown(config, summary))
    return {"summary": summary, "samples": samples, "files": {"tables": "simulate.md"}}


def _goodput(own: Outcome) -> float:
    return 100 * own.goodput_per_s / own.ideal_per_s if own.ideal_per_s else 0.0


def _means(found: list[Outcome], job: Job, fleet: Fleet) -> dict[str, float]:
    seconds = sum(each.seconds for each in found)
    tokens = sum(each.committed * each.micro_batches for each in found) * job.chain.tokens
    values = {
        "goodput_percent": statistics.fmean(_goodput(each) for each in found),
        "tokens_per_s": tokens / seconds,
        "committed_steps": statistics.fmean(each.committed for each in found),
        "lost_steps": statistics.fmean(each.lost_steps for each in found),
        "wasted_percent": 100 * sum(each.wasted_s for each in found) / seconds,
        "holding_percent": 100 * sum(each.holding_s for each in found) / seconds,
        "stuck_percent": 100 * sum(each.stuck_s for each in found) / seconds,
        "moved_gib": statistics.fmean(each.moved_bytes for each in found) / GIB,
    }
    silences = [each for own in found for each in own.found_s]
    if silences:
        values["found_ms_p50"] = statistics.median(silences) * 1e3
    if tokens and all(each.usd_per_hour is not None for each in fleet.providers):
        values["usd_per_million_tokens"] = sum(each.usd for each in found) / tokens * 1e6
    if tokens and all(each.watts is not None for each in fleet.providers):
        values["joule_per_token"] = sum(each.joule for each in found) / tokens
    for how in sorted({how for each in found for how in each.repairs}):
        values[f"repairs/{how}"] = statistics.fmean(each.repairs.get(how, 0) for each in found)
    return values


COLUMNS = {
    "goodput %": "goodput_percent",
    "tokens/s": "tokens_per_s",
    "steps": "committed_steps",
    "begun again": "lost_steps",
    "wasted %": "wasted_percent",
    "fetching %": "holding_percent",
    "no plan %": "stuck_percent",
    "silence found ms": "found_ms_p50",
    "moved GiB": "moved_gib",
    "USD / 1M tokens": "usd_per_million_tokens",
    "J / token": "joule_per_token",
}


def markdown(config: schema.Config, summary: dict[str, float]) -> str:
    """A row for each mean time between failures."""
    task = config.task
    assert isinstance(task, schema.DecentralSimulate)
    columns = {head: key for head, key in COLUMNS.items() if any(f"{m:g}s/{key}" in summary for m in task.mtbf_s)}
    rows = []
    for mtbf in task.mtbf_s:
        values = [summary.get(f"{mtbf:g}s/{key}") for key in columns.values()]
        rows.append([f"{mtbf:g} s", *("" if each is None else f"{each:,.4g}" for each in values)])
    fleet = f"{task.providers} providers of {task.fleet}" if task.fleet in FLEETS else task.fleet
    head = f"**{config.model.name} on {fleet}, {task.hours:g} hours, {task.runs} runs each**"
    return "\n".join([head, "", *piped(("mean time between failures", *columns), rows)]) + "\n"
