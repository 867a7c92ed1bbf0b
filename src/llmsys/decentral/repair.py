"""A plan after a provider has gone, or one has come: as little as possible moves.

Of one that has gone:

    spare     another takes its stage
    absorb    its neighbours take its operators
    recut     the pipeline is cut anew, without it or with a spare in its place
    drop      the pipeline ends, the other replicas go on, and its providers are spares: only where that is faster by
              more than `worth`, as nothing puts these to use again before all is planned anew
    replan    everything is planned anew: only where the best of the above is more than `worth` below what the
              providers that are left were good for when that was done last

The one is taken that moves least of those that are not more than `worth` slower than the fastest.
"""

from __future__ import annotations

import dataclasses
import itertools
import math
from collections.abc import Iterator, Sequence
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
    made = [(how, left.made((*whole, one))) for how, one in _ways(left, plan, hurt, gone)]
    best = max((found.per_s for _, found in made), default=0.0)
    if whole and plan.objective == "throughput" and (dropped := left.made(whole)).per_s * worth > best:
        made, best = [("drop", dropped)], dropped.per_s
    fresh = left.best() if best < worth * _good(left, plan) or not made else None
    if fresh is not None and fresh.per_s * worth > best:
        return left, Repair(plan=fresh, how="replan", moved_bytes=moved(planner.costs, plan, fresh))
    if not made:
        raise ValueError(missing(left.costs))
    after = (fresh or plan).worth
    enough = [(moved(planner.costs, plan, found), how, found) for how, found in made if found.per_s >= worth * best]
    least = min(each[0] for each in enough) * (1 + 1e-9)
    nbytes, how, found = max((each for each in enough if each[0] <= least), key=lambda each: each[2].per_s)
    return left, Repair(plan=dataclasses.replace(found, worth=after), how=how, moved_bytes=nbytes)


def after_join(planner: Planner, plan: Plan, new: int, worth: float = WORTH) -> Repair:
    """Of `planner`, whose fleet has a provider at place `new` that the plan does not know: it is a spare, or is put
    into a pipeline (`insert`) where that makes all more than 1 / `worth` times as fast; or with the other spares it
    makes one more (`replica`); or all is planned anew, as above."""
    best = Repair(plan=dataclasses.replace(plan, spares=(*plan.spares, new)), how="none", moved_bytes=0.0)
    if new not in planner.costs.usable:
        return best
    usable = set(planner.costs.usable)
    spares = [p for p in best.plan.spares if p in usable]
    enough = plan.per_s / worth
    ways = []
    one_more = planner.costs.work.most == 0 or len(plan.pipelines) < planner.costs.work.most
    if one_more and plan.objective == "throughput" and (own := planner.finder.pipeline(spares)) is not None:
        ways.append(("replica", (*plan.pipelines, own)))
    slowest = max(plan.pipelines, key=lambda each: each.seconds)
    others = tuple(each for each in plan.pipelines if each is not slowest)
    orders = [(*slowest.order[:at], new, *slowest.order[at:]) for at in range(len(slowest.order) + 1)]
    if (found := planner.finder.best_of(orders)) is not None:
        ways.append(("insert", (*others, found)))
    for how, pipelines in ways:
        made = planner.made(pipelines)
        if made.per_s > enough:
            made = dataclasses.replace(made, worth=plan.worth)
            best = Repair(plan=made, how=how, moved_bytes=moved(planner.costs, plan, made))
            enough = made.per_s
    if best.plan.per_s < worth * _good(planner, plan) and (fresh := planner.best()) is not None:
        if fresh.per_s * worth > best.plan.per_s:
            return Repair(plan=fresh, how="replan", moved_bytes=moved(planner.costs, plan, fresh))
        best = dataclasses.replace(best, plan=dataclasses.replace(best.plan, worth=fresh.worth))
    return best


def _good(planner: Planner, plan: Plan) -> float:
    """Micro-batches a second that those who are there were good for."""
    return plan.worth * planner.flops


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
    at, costs = hurt.order.index(gone), left.costs
    spares = [p for p in plan.spares if p in costs.usable]

    def whole(order: Sequence[int], cuts: Sequence[int]) -> Pipeline:
        seconds = costs.slowest_s if plan.objective == "throughput" else costs.latency_s
        return Pipeline(tuple(order), tuple(cuts), seconds(order, cuts))

    def around(order: Sequence[int], cuts: Sequence[int]) -> tuple[float, float]:
        """(the slowest, the sum) of the stages next to the place, which are all that another one there changes."""
        near = [costs.stage(order, cuts, k) for k in range(max(0, at - 1), min(len(order), at + 2))]
        found = [math.inf if each is None else each.slowest_s for each in near]
        return max(found, default=math.inf), sum(found)

    replaced = _replaced(hurt.order, at, spares)
    if replaced:
        best = whole(min(replaced, key=lambda order: around(order, hurt.cuts)), hurt.cuts)
        if best.seconds < math.inf:
            yield "spare", best
    order = (*hurt.order[:at], *hurt.order[at + 1 :])
    if not order:
        return
    if 0 < at < len(order):
        begin, end = hurt.cuts[at], hurt.cuts[at + 1]
        middles = [p for p in costs.chain.places.tolist() if begin <= p <= end]
        joined = [(*hurt.cuts[:at], middle, *hurt.cuts[at + 2 :]) for middle in middles]
    else:
        joined = [_ends(hurt, at)]
    best = whole(order, min(joined, key=lambda cuts: around(order, cuts)))
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
