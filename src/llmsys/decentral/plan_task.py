"""The task `decentral_plan`.

The summary's keys: `micro_batches_per_s`, `tokens_per_s` (of images, rows), `step_ms` with `sync_ms` in it (of
training), `latency_ms` of the first pipeline, `simulated_step_ms` (its events one by one, without what replicas wait
for one another), `replicas`, `providers`, `spares`, `plan_ms` that planning took, `usd_per_million_tokens` and
`joule_per_token` where all prices or powers are known; of each stage `<pipeline>/<stage>/{compute, send, receive}_ms`
and `device_gib`, `host_gib`. Samples `gantt/...` are the first pipeline's events, a column for each field of a
`schedule.Span`.
"""

from __future__ import annotations

import dataclasses
import json
import time
from typing import TYPE_CHECKING, Any

from llmsys import schema
from llmsys.decentral import adatopk, asked, pictures, schedule, shapes, tables
from llmsys.decentral.chain import Chain
from llmsys.decentral.cost import Costs, Workload
from llmsys.decentral.fleet import GIB, Fleet
from llmsys.decentral.plan import OF_1F1B, Plan, Planner, scheduled
from llmsys.files import write_atomic
from llmsys.schema.decentral import AUTO

if TYPE_CHECKING:
    from llmsys.context import Context

WIDTHS = {"fp32": 4, "bf16": 2}
DRAWN = 24
"""Micro-batches of a picture."""


def plan(config: schema.Config, context: Context) -> dict[str, Any]:
    """The record's summary; `plan.md` with its tables, `plan.json`, and where matplotlib is there `plan.png`."""
    task = config.task
    assert isinstance(task, schema.DecentralPlan)
    fleet = asked.fleet(config, context.inputs.get("fleet"))
    context.beat(phase="tracing the model")
    own = chain(config)
    context.beat(phase="planning")
    begin = time.perf_counter()
    planner, found = planned(config, own, fleet)
    densities: adatopk.Lines = {}
    if task.density < 1:
        planner, found, densities = adatopk.compressed(planner, found, task.density, WIDTHS[config.model.dtype])
    plan_ms = (time.perf_counter() - begin) * 1e3
    first, costs = found.pipelines[0], planner.costs
    shares = found.score.shares if costs.work.train else (min(DRAWN, costs.work.micro_batches),)
    spans = schedule.run(schedule.Timing.of(costs, first), costs.work.schedule, shares[0])
    summary = _summary(costs, found) | {"plan_ms": plan_ms, "simulated_step_ms": schedule.ends_s(spans) * 1e3}
    write_atomic(context.out / "plan.md", tables.plan(costs, found, densities))
    write_atomic(context.out / "plan.json", json.dumps(plain(costs, found, densities), indent=1) + "\n")
    files, notes = {"tables": "plan.md", "plan": "plan.json"}, {}
    few = schedule.run(schedule.Timing.of(costs, first), costs.work.schedule, min(DRAWN, shares[0]))
    names = [costs.fleet.providers[p].name for p in first.order]
    try:
        pictures.save(pictures.gantt(few, names), context.out / "plan.png")
        files["picture"] = "plan.png"
    except ImportError:
        notes["picture"] = "none: matplotlib is missing (pip install 'llmsys[notebooks]')"
    return {"summary": summary, "samples": pictures.columns_of(few), "files": files, "notes": notes}


def planned(config: schema.Config, own: Chain, fleet: Fleet) -> tuple[Planner, Plan]:
    """With the schedule that is asked for, or the better one."""
    task, work = config.task, workload(config)
    assert isinstance(task, schema.DecentralPlan)
    if task.schedule == AUTO:
        return scheduled(own, fleet, work, task.objective, task.replicas or None)
    planner = Planner(Costs(own, fleet, work), task.objective)
    return planner, planner.must(task.replicas or None)


def chain(config: schema.Config) -> Chain:
    """Of the model, with the config's rows and length."""
    task = config.task
    assert isinstance(task, schema.Planning)
    rows, length = config.train.micro_batch, config.train.length
    attention = config.model.attention if isinstance(config.model, schema.Transformer) else "sdpa"
    attention = "eager" if attention == "eager" else "sdpa"
    return shapes.of_model(config.model, rows, length, train=task.train, attention=attention, level=task.level)


def workload(config: schema.Config) -> Workload:
    task = config.task
    assert isinstance(task, schema.Planning)
    state = task.optimizer_bytes or (6.0 if config.model.dtype == "bf16" else 2.0)
    plain = Workload(train=task.train, optimizer=state, recompute=config.train.recompute != "none")
    if not isinstance(task, schema.DecentralPlan):
        return plain
    return dataclasses.replace(
        plain,
        micro_batches=task.micro_batches,
        schedule=OF_1F1B[0] if task.schedule == AUTO else task.schedule,
        offload=task.offload,
        private=(task.private[0], task.private[1]),
        regions=tuple(task.regions),
        min_mbit=task.min_mbit,
    )


def _summary(costs: Costs, found: Plan) -> dict[str, float]:
    first = found.pipelines[0]
    tokens_per_s = found.per_s * costs.chain.tokens
    values: dict[str, float] = {
        "micro_batches_per_s": found.per_s,
        "tokens_per_s": tokens_per_s,
        "step_ms": found.score.step_s * 1e3,
        "sync_ms": found.score.sync_s * 1e3,
        "latency_ms": costs.latency_s(first.order, first.cuts) * 1e3,
        "replicas": len(found.pipelines),
        "providers": sum(len(each.order) for each in found.pipelines),
        "spares": len(found.spares),
        "operators": costs.chain.count,
    }
    used = [costs.fleet.providers[p] for each in found.pipelines for p in each.order]
    prices, powers = [each.usd_per_hour for each in used], [each.watts for each in used]
    if None not in prices:
        values["usd_per_million_tokens"] = sum(filter(None, prices)) / 3600 / tokens_per_s * 1e6
    if None not in powers:
        values["joule_per_token"] = sum(filter(None, powers)) / tokens_per_s
    for at, each in enumerate(found.pipelines):
        stages = costs.stages(each.order, each.cuts)
        assert stages is not None
        for stage, cost in enumerate(stages):
            where = f"{at}/{stage}"
            values[f"{where}/compute_ms"] = cost.compute_s * 1e3
            values[f"{where}/send_ms"] = cost.send_s * 1e3
            values[f"{where}/receive_ms"] = cost.receive_s * 1e3
            values[f"{where}/device_gib"] = cost.device_bytes / GIB
            if cost.host_bytes:
                values[f"{where}/host_gib"] = cost.host_bytes / GIB
    return values


def plain(costs: Costs, found: Plan, densities: adatopk.Lines) -> dict[str, Any]:
    """The plan as JSON: providers by name, operators by theirs."""
    names = [each.name for each in costs.fleet.providers]

    def stages(order: tuple[int, ...], cuts: tuple[int, ...]) -> list[dict[str, Any]]:
        return [
            {
                "provider": names[p],
                "begin": begin,
                "end": end,
                "first": costs.chain.names[begin],
                "last": costs.chain.names[end - 1],
            }
            for p, begin, end in zip(order, cuts, cuts[1:], strict=False)
        ]

    return {
        "objective": found.objective,
        "pipelines": [
            {"share": share, "slowest_ms": each.seconds * 1e3, "stages": stages(each.order, each.cuts)}
            for each, share in zip(found.pipelines, found.score.shares, strict=True)
        ],
        "spares": [names[p] for p in found.spares],
        "densities": [{"from": names[p], "to": names[q], "density": each} for (p, q), each in densities.items()],
    }
