"""A plan after a provider has gone, or one has come: as little as possible moves.

Of one that has gone, in this order of what has to be moved, and so of how soon all goes on:

    spare     another takes its stage
    absorb    its neighbours take its operators
    recut     the pipeline is cut anew, without it or with a spare in its place
    drop      the pipeline ends, the other replicas go on, and its providers are spares
    replan    everything is planned anew: only where the best of the above is more than `worth` below what the
              providers that are left are good for

Among the first four the one is taken that moves least of those that are not more than `worth` slower than the fastest.
"""

from __future__ import annotations

import dataclasses
import itertools
import math
from collections.abc import Iterator
from dataclasses import dataclass

from llmsys.decentral.cost import Costs
from llmsys.decentral.missing import missing
from llmsys.decentral.order import Pipeline
from llmsys.decentral.plan import Plan, Planner

WORTH = 0.9


@dataclass(frozen=True, kw_only=True)
class Repair:
    """`how`: one of the words above, or `none` where nothing had to change. `moved_bytes`: weights and optimizer state
    that providers need and do not have."""

    plan: Plan
    how: str
    moved_bytes: float


def after_quit(planner: Planner, plan: Plan, gone: int, worth: float = WORTH) -> tuple[Planner, Repair]:
    """`planner` without the provider at place `gone`, and the plan. ValueError where what is left cannot hold the
    chain."""
    if gone not in {*plan.spares, *(p for each in plan.pipelines for p in each.order)}:
        raise ValueError(f"provider {planner.costs.fleet.providers[gone].name}: is not in the plan")
    left = planner.without(gone)
    if gone in plan.spares:
        spares = tuple(p for p in plan.spares if p != gone)
        return left, Repair(plan=dataclasses.replace(plan, spares=spares), how="none", moved_bytes=0.0)
    hurt = next(each for each in plan.pipelines if gone in each.order)
    whole = tuple(each for each in plan.pipelines if each is not hurt)
    tried = [(how, (*whole, one)) for how, one in _ways(left, plan, hurt, gone)]
    if whole and plan.objective == "throughput":
        tried.append(("drop", whole))
    made = [(how, left.made(pipelines), pipelines) for how, pipelines in tried]
    good = planner.costs.fleet.providers
    share = 1 - good[gone].flops / sum(good[p].flops for each in plan.pipelines for p in each.order)
    best = max((found.per_s for _, found, _ in made), default=0.0)
    if best < worth * share * plan.per_s and (fresh := left.best()) is not None and fresh.per_s * worth > best:
        return left, Repair(plan=fresh, how="replan", moved_bytes=moved(planner.costs, plan, fresh))
    if not made:
        raise ValueError(missing(left.costs))
    enough = [(moved(planner.costs, plan, found), how, found) for how, found, _ in made if found.per_s >= worth * best]
    nbytes, how, found = min(enough, key=lambda each: each[0])
    return left, Repair(plan=found, how=how, moved_bytes=nbytes)


def after_join(planner: Planner, plan: Plan, new: int, worth: float = WORTH) -> Repair:
    """Of `planner`, whose fleet has a provider at place `new` that the plan does not know: it is a spare, or is put
    into a pipeline (`insert`) where that makes all more than 1 / `worth` times as fast; or with the other spares it
    makes one more (`replica`)."""
    spares = (*plan.spares, new)
    best = Repair(plan=dataclasses.replace(plan, spares=spares), how="none", moved_bytes=0.0)
    if new not in planner.costs.usable:
        return best
    enough = plan.per_s / worth
    ways = []
    if plan.objective == "throughput" and (own := planner.finder.pipeline(spares)) is not None:
        ways.append(("replica", (*plan.pipelines, own)))
    slowest = max(plan.pipelines, key=lambda each: each.seconds)
    others = tuple(each for each in plan.pipelines if each is not slowest)
    orders = [(*slowest.order[:at], new, *slowest.order[at:]) for at in range(len(slowest.order) + 1)]
    if (found := planner.finder.best_of(orders)) is not None:
        ways.append(("insert", (*others, found)))
    for how, pipelines in ways:
        made = planner.made(pipelines)
        if made.per_s > enough:
            best = Repair(plan=made, how=how, moved_bytes=moved(planner.costs, plan, made))
            enough = made.per_s
    return best


def moved(costs: Costs, before: Plan, after: Plan) -> float:
    """Bytes of weights and optimizer state that providers have to get, each from somebody."""
    held: dict[int, tuple[int, int]] = {}
    same = {id(each) for each in before.pipelines} & {id(each) for each in after.pipelines}
    for each in (one for one in before.pipelines if id(one) not in same):
        held |= dict(zip(each.order, itertools.pairwise(each.cuts), strict=True))
    total = 0.0
    for each in (one for one in after.pipelines if id(one) not in same):
        for p, (begin, end) in zip(each.order, itertools.pairwise(each.cuts), strict=True):
            low, high = held.get(p, (begin, begin))
            kept = max(0, min(end, high) - max(begin, low))
            inside = costs.weights[min(end, high)] - costs.weights[max(begin, low)] if kept else 0.0
            total += float(costs.weights[end] - costs.weights[begin] - inside)
    return total * (1 + (costs.work.optimizer if costs.work.train else 0.0))


def _ways(left: Planner, plan: Plan, hurt: Pipeline, gone: int) -> Iterator[tuple[str, Pipeline]]:
    """The pipeline `hurt`, mended."""
    at = hurt.order.index(gone)
    seconds = left.costs.slowest_s if plan.objective == "throughput" else left.costs.latency_s
    spares = [p for p in plan.spares if p in left.costs.usable]
    fits = [Pipeline(order, hurt.cuts, seconds(order, hurt.cuts)) for order in _replaced(hurt.order, at, spares)]
    best = min(fits, key=lambda each: each.seconds, default=None)
    if best is not None and best.seconds < math.inf:
        yield "spare", best
    order = (*hurt.order[:at], *hurt.order[at + 1 :])
    if not order:
        return
    begin, end = hurt.cuts[at], hurt.cuts[at + 1]
    places = [p for p in left.costs.chain.places.tolist() if begin <= p <= end]
    middles = places if 0 < at < len(order) else [0 if at == 0 else hurt.cuts[-1]]
    absorbed = []
    for middle in middles:
        cuts = (*hurt.cuts[:at], middle, *hurt.cuts[at + 2 :]) if 0 < at < len(order) else _ends(hurt, at)
        absorbed.append(Pipeline(order, cuts, seconds(order, cuts)))
    best = min(absorbed, key=lambda each: each.seconds)
    if best.seconds < math.inf:
        yield "absorb", best
    if (found := left.finder.best_of([order, *_replaced(hurt.order, at, spares[:NEAR])])) is not None:
        yield "recut", found


NEAR = 4
"""Spares that a pipeline is cut anew with."""


def _ends(hurt: Pipeline, at: int) -> tuple[int, ...]:
    """Cuts without the first stage, whose operators go to the second; or without the last."""
    return (hurt.cuts[0], *hurt.cuts[2:]) if at == 0 else (*hurt.cuts[:-2], hurt.cuts[-1])


def _replaced(order: tuple[int, ...], at: int, others: list[int]) -> list[tuple[int, ...]]:
    return [(*order[:at], other, *order[at + 1 :]) for other in others]
