"""The pipeline of a group of providers: which of them, in which order, cut where.

Of a few, all orders (`order`). Of more, several rows are walked (`walk`), the best is improved by local search, and cut
exactly where it is short enough (`cuts`); then each cut is moved to where less crosses, if no stage gets slower by it.
"""

from __future__ import annotations

import math
from bisect import bisect_left
from collections.abc import Sequence

from llmsys.decentral.cost import Costs
from llmsys.decentral.order import ALL, Pipeline, Search
from llmsys.decentral.parts import ROWS, by_memory
from llmsys.decentral.walk import TRIES, Walk, Walked

EXACTLY, SEARCHED, HURRIED = 12, 16, 24
"""Providers of a fleet up to which neighbouring orders are cut exactly; of a pipeline, up to which the last of them is;
of a fleet, beyond which less is searched, so that a plan takes hundredths of a second."""
ROUGH, TRIED = 6, 3
"""Steps in which orders are compared; sets of providers of which one micro-batch is sent through soonest."""
WINDOW, LOOKED_AT = 24, 8
"""Positions on each side of a cut among which a better one is looked for; how many of them, at most."""


class Finder:
    """`thorough`: as of `plan.Planner`. What was found of a group is remembered."""

    def __init__(self, costs: Costs, objective: str, *, thorough: bool) -> None:
        self.costs, self.objective, self.thorough = costs, objective, thorough
        self.search, self.walk = Search(costs, objective), Walk(costs)
        self.found: dict[tuple[int, ...], Pipeline | None] = {}
        self.soon: dict[tuple[int, ...], Pipeline | None] = {}

    def pipeline(self, members: Sequence[int]) -> Pipeline | None:
        """The best one that is found of some of `members`; in a small fleet the best there is."""
        key = tuple(sorted(members))
        if key not in self.found:
            few = self.thorough and len(self.costs.usable) <= ALL
            self.found[key] = self.search.all_orders(key) if few else self._searched(members)
        return self.found[key]

    def soonest(self, members: Sequence[int]) -> Pipeline | None:
        """The one that a micro-batch alone is through soonest, of a few providers; of more the best of a few orders."""
        key = tuple(sorted(members))
        if key not in self.soon:
            search = Search(self.costs, "latency")
            found = search.all_orders(members) if len(members) <= ALL else search.first(members)
            seconds = math.inf if found is None else self.costs.slowest_s(found.order, found.cuts)
            self.soon[key] = None if found is None else found._replace(seconds=seconds)
        return self.soon[key]

    def _searched(self, members: Sequence[int]) -> Pipeline | None:
        """Walked along each row and improved; in a fleet that is small enough cut exactly in the end."""
        if self.objective == "latency":
            return self.search.best(members) if len(members) <= HURRIED else self._of_few(members)
        rows = (row(self.costs, members) for row in (*ROWS.values(), by_memory))
        found = [each for row in rows if (each := self.walk.best(row)) is not None]
        best = min(found, key=lambda each: each[2], default=None)
        if best is None:
            return self.search.first(members) if len(members) <= SEARCHED else None
        large = len(self.costs.usable) > HURRIED
        best = self.walk.improved(best, members, TRIES // 4 if large else TRIES)
        if large or len(members) > SEARCHED:
            return self._tidied(_whole(best))
        own = _whole(self.walk.sooner(best, members))
        own = self.search.cut(own.order, own.seconds) or own
        if self.thorough and len(self.costs.usable) <= EXACTLY:
            better = self.search.improved(own, members)
            if better.seconds < own.seconds:
                walked = (list(better.order), list(better.cuts), better.seconds)
                own = _whole(self.walk.sooner(walked, members))
        return self._tidied(own)

    def _of_few(self, members: Sequence[int]) -> Pipeline | None:
        """One that few are in: the fastest, the largest and those with the best lines, of one region or of all, and
        more of them where these do not hold the chain. The best of such sets are improved."""
        providers = self.costs.fleet.providers
        regions = {providers[p].region for p in members}
        best = (
            lambda p: providers[p].flops,
            lambda p: providers[p].mem_gib,
            lambda p: min(providers[p].up_mbit, providers[p].down_mbit),
        )
        count = SEARCHED // len(best)
        while True:
            pools = []
            for names in (regions, *({name} for name in sorted(regions) if len(regions) > 1)):
                inside = [p for p in members if providers[p].region in names]
                pools.append(sorted({p for key in best for p in sorted(inside, key=key, reverse=True)[:count]}))
            found = [(one, pool) for pool in pools if (one := self.search.first(pool)) is not None]
            if found:
                found.sort(key=lambda each: each[0].seconds)
                tried = [self.search.improved(one, pool) for one, pool in found[:TRIED] if len(pool) <= SEARCHED]
                return min([found[0][0], *tried], key=lambda each: each.seconds)
            if count >= len(members):
                return None
            count *= 2

    def _tidied(self, own: Pipeline) -> Pipeline:
        """Cut as near as less crosses, where no stage becomes slower than the slowest: a micro-batch is through
        sooner."""
        costs, places, order = self.costs, self.walk.places, own.order
        crossing, cuts = costs.ahead + costs.back, list(own.cuts)

        def around(k: int) -> tuple[float, float]:
            """(the slower of the two stages at cut k, seconds of a micro-batch in them and between)."""
            two = [costs.stage(order, cuts, at) for at in (k - 1, k)]
            p, q, cut = order[k - 1], order[k], cuts[k]
            wire = float(costs.ahead[cut]) * costs.beta(p, q) + float(costs.back[cut]) * costs.beta(q, p)
            slowest = max(math.inf if each is None else each.slowest_s for each in two)
            return slowest, wire + sum(each.compute_s for each in two if each is not None)

        for k in range(1, len(cuts) - 1):
            at, here, (_, now) = bisect_left(places, cuts[k]), cuts[k], around(k)
            near = [p for p in places[max(1, at - WINDOW) : at + WINDOW] if cuts[k - 1] < p < cuts[k + 1]]
            less = sorted((p for p in near if crossing[p] < crossing[here]), key=lambda p: (crossing[p], abs(p - here)))
            for place in less[:LOOKED_AT]:
                cuts[k] = place
                slowest, after = around(k)
                if slowest <= own.seconds and after < now:
                    break
                cuts[k] = here
        return Pipeline(order, tuple(cuts), costs.slowest_s(order, cuts))

    def along(self, order: Sequence[int]) -> Pipeline | None:
        """Walked, and not to the end."""
        found = self.walk.best(order, steps=ROUGH)
        return None if found is None else _whole(found)

    def cut(self, order: Sequence[int], below: float = math.inf) -> Pipeline | None:
        """The best cuts of an order, where they are better than `below`: exact, or of long ones walked."""
        if len(order) <= SEARCHED or self.objective == "latency":
            return self.search.cut(order, below)
        found = self.walk.best(order, below)
        return None if found is None else _whole(found)

    def best_of(self, orders: Sequence[Sequence[int]]) -> Pipeline | None:
        """The best of these orders as they are walked, cut as well as its length allows."""
        walked = [(found[2], order) for order in orders if (found := self.walk.best(order, steps=ROUGH)) is not None]
        if self.objective == "latency" or not walked:
            cut = [each for order in orders if (each := self.cut(order)) is not None]
            return min(cut, key=lambda each: each.seconds, default=None)
        return self.cut(min(walked)[1])


def _whole(walked: Walked) -> Pipeline:
    order, cuts, seconds = walked
    return Pipeline(tuple(order), tuple(cuts), seconds)
