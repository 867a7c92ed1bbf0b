"""Which provider runs what: the plan.

    plan(chain, fleet, Workload(...))                        most micro-batches a second
    plan(chain, fleet, Workload(...), objective="latency")   one micro-batch soonest

A plan is one pipeline or several replicas of it, with the providers that are left as spares. Up to six providers every
order of every subset is gone through, and every way to part them into replicas. Of more, providers are put in a row,
by lines, regions or speed, and the row is parted into 1, 2, 3, ... groups, each of which gets the best pipeline that is
found of it (`order`; of large groups `walk`); the best of all these is taken.
"""

from __future__ import annotations

import dataclasses
import itertools
import math
from bisect import bisect_left
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

from llmsys.decentral.chain import Chain
from llmsys.decentral.cost import Costs, Workload
from llmsys.decentral.fleet import GIB, Fleet
from llmsys.decentral.order import ALL, Pipeline, Search
from llmsys.decentral.score import Score, score, share_of
from llmsys.decentral.walk import TRIES, Walk

EXACTLY, SEARCHED, HURRIED, MANY = 12, 16, 24, 64
"""Providers up to which neighbouring orders of a pipeline are cut exactly; up to which the last of them is; of a fleet,
beyond which less is searched, so that a plan takes hundredths of a second; and up to which the best of its groups are
searched at all, and not walked alone."""
POLISHED, ROUGH, PATIENCE = 2, 6, 2
"""How many of the ways to part a fleet are searched; steps in which ways are compared; numbers of replicas, each larger
than the last, after which more are not tried where none was better."""
WINDOW, LOOKED_AT = 24, 8
"""Positions on each side of a cut among which a better one is looked for; how many of them, at most."""


@dataclass(frozen=True, kw_only=True)
class Plan:
    """`pipelines` of providers by their place in the fleet, `seconds` of each its slowest stage, or with
    `objective=latency` the sum; `spares`: providers without a stage. `score` of the pipelines."""

    pipelines: tuple[Pipeline, ...]
    spares: tuple[int, ...]
    score: Score
    objective: str = "throughput"

    @property
    def per_s(self) -> float:
        """Micro-batches a second."""
        return self.score.per_s


def plan(
    chain: Chain, fleet: Fleet, work: Workload, objective: str = "throughput", replicas: int | None = None
) -> Plan:
    """The best plan that is found; `replicas`: so many pipelines, and not as many as are best. Of one pipeline
    throughput is that of the full pipeline, its slowest stage; of several a step's, with all that it waits for.

    ValueError where no pipeline of the fleet holds the chain: what is missing, and what would suffice."""
    costs = Costs(chain, fleet, work)
    found = Planner(costs, objective).best(replicas)
    if found is None:
        raise ValueError(_short(costs))
    return found


class Planner:
    """`costs` with what several plans of one fleet share. `thorough`: go through everything where providers are few,
    for tenths of a second; else search as where they are many, for hundredths."""

    def __init__(self, costs: Costs, objective: str = "throughput", *, thorough: bool = True) -> None:
        self.costs, self.objective, self.thorough = costs, objective, thorough
        self.search, self.walk = Search(costs, objective), Walk(costs)
        self.found: dict[tuple[int, ...], Pipeline | None] = {}

    def best(self, replicas: int | None = None) -> Plan | None:
        """As `plan`; None where nothing holds the chain."""
        members = self.costs.usable
        if not members or self._memory(members) < 1:
            return None
        if self.objective == "latency":
            one = self.pipeline(members)
            return None if one is None else self.made([one])
        few = self.thorough and len(members) <= ALL
        ways = self._few(members) if few else self._many(members, replicas)
        made = [self.made(way) for way in ways if way and (replicas is None or len(way) == replicas)]
        return max(made, key=lambda each: each.per_s, default=None)

    def made(self, pipelines: Sequence[Pipeline]) -> Plan:
        """A plan of these."""
        if self.objective == "latency":
            result = Score(shares=(1,), step_s=pipelines[0].seconds, sync_s=0.0)
        else:
            result = score(self.costs, pipelines)
            pipelines = [each for each, share in zip(pipelines, result.shares, strict=True) if share]
            result = Score(shares=tuple(s for s in result.shares if s), step_s=result.step_s, sync_s=result.sync_s)
        used = {p for each in pipelines for p in each.order}
        spares = tuple(p for p in range(len(self.costs.fleet)) if p not in used | self.costs.absent)
        return Plan(pipelines=tuple(pipelines), spares=spares, score=result, objective=self.objective)

    def pipeline(self, members: Sequence[int]) -> Pipeline | None:
        """The best one that is found of some of `members`; in a small fleet the best there is."""
        key = tuple(sorted(members))
        if key not in self.found:
            few = self.thorough and len(self.costs.usable) <= ALL
            self.found[key] = self.search.all_orders(key) if few else self._searched(members)
        return self.found[key]

    def _searched(self, members: Sequence[int]) -> Pipeline | None:
        """Walked along each row and improved; in a fleet that is small enough cut exactly in the end."""
        if self.objective == "latency":
            return self.search.best(members)
        rows = (row(self.costs, members) for row in (*ROWS.values(), by_memory))
        found = [each for row in rows if (each := self.walk.best(row)) is not None]
        best = min(found, key=lambda each: each[2], default=None)
        if best is None:
            return self.search.first(members) if len(members) <= SEARCHED else None
        large = len(self.costs.usable) > HURRIED
        order, cuts, seconds = self.walk.improved(best, members, TRIES // 4 if large else TRIES)
        if large or len(members) > SEARCHED:
            return self._tidied(Pipeline(tuple(order), tuple(cuts), seconds))
        order, cuts, seconds = self.walk.sooner((order, cuts, seconds), members)
        own = Pipeline(tuple(order), tuple(cuts), seconds)
        own = self.search.cut(order, seconds) or own
        if self.thorough and len(self.costs.usable) <= EXACTLY:
            better = self.search.improved(own, members)
            if better.seconds < own.seconds:
                order, cuts, seconds = self.walk.sooner(
                    (list(better.order), list(better.cuts), better.seconds), members
                )
                own = Pipeline(tuple(order), tuple(cuts), seconds)
        return self._tidied(own)

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

    def _along(self, order: Sequence[int]) -> Pipeline | None:
        """Walked, and not to the end."""
        found = self.walk.best(order, steps=ROUGH)
        return None if found is None else Pipeline(tuple(found[0]), tuple(found[1]), found[2])

    def _few(self, members: Sequence[int]) -> Iterator[list[Pipeline]]:
        """Every way to part some of them."""
        for parts in _partitions(list(members)):
            pipelines = [self.pipeline(part) for part in parts]
            if None not in pipelines:
                yield [each for each in pipelines if each is not None]
        one = self.pipeline(members)
        if one is not None:
            yield [one]

    def _many(self, members: Sequence[int], replicas: int | None) -> Iterator[list[Pipeline]]:
        """Rows of them, parted into groups: all ways walked, and the pipelines of the best of these searched."""
        if replicas in (None, 1) and (one := self.pipeline(members)) is not None:
            yield [one]
        counts = [replicas] if replicas else _counts(self._most(members))[1:]
        walked: list[tuple[float, int, list[list[int]], list[Pipeline]]] = []
        for row in ROWS.values():
            order, best, worse = row(self.costs, members), 0.0, 0
            for count in counts:
                groups = _groups(self.costs, order, count)
                pipelines = [each for group in groups if (each := self._along(group)) is not None]
                rates = [0.0]
                for some in self._enough(pipelines):
                    rates.append(score(self.costs, some).per_s)
                    walked.append((rates[-1], -len(walked), groups, some))
                best, worse = max(best, *rates), 0 if max(rates) > best else worse + 1
                if worse == PATIENCE:
                    break
        walked.sort(reverse=True)
        yield from (some for *_, some in walked[:1])
        if len(members) <= MANY:
            for _, _, groups, some in walked[: POLISHED if len(members) <= HURRIED else 1]:
                yield [
                    self._polished(each, group) for each in some for group in groups if set(each.order) <= set(group)
                ]

    def _polished(self, found: Pipeline, group: Sequence[int]) -> Pipeline:
        """The better of a walked pipeline and one that is searched of the same providers."""
        other = self.pipeline(group)
        return other if other is not None and other.seconds < found.seconds else found

    def _enough(self, pipelines: list[Pipeline]) -> Iterator[list[Pipeline]]:
        if pipelines:
            yield pipelines
        if self.costs.work.train and len(pipelines) > 2:
            yield from self._without_slow(pipelines)

    def cut(self, order: Sequence[int], below: float = math.inf) -> Pipeline | None:
        """The best cuts of an order, where they are better than `below`: exact, or of long ones walked."""
        if len(order) <= SEARCHED or self.objective == "latency":
            return self.search.cut(order, below)
        found = self.walk.best(order, below)
        return None if found is None else Pipeline(tuple(found[0]), tuple(found[1]), found[2])

    def best_of(self, orders: Sequence[Sequence[int]]) -> Pipeline | None:
        """The best of these orders as they are walked, cut as well as its length allows."""
        walked = [(found[2], order) for order in orders if (found := self.walk.best(order, steps=ROUGH)) is not None]
        if self.objective == "latency" or not walked:
            cut = [each for order in orders if (each := self.cut(order)) is not None]
            return min(cut, key=lambda each: each.seconds, default=None)
        return self.cut(min(walked)[1])

    def without(self, p: int) -> Planner:
        """As if the provider at this place had never come; the others keep their places."""
        return Planner(
            dataclasses.replace(self.costs, absent=self.costs.absent | {p}), self.objective, thorough=self.thorough
        )

    def short(self) -> str:
        """Why nothing holds the chain."""
        return _short(self.costs)

    def _most(self, members: Sequence[int]) -> int:
        """Pipelines that there is memory for."""
        return max(1, min(len(members), int(self._memory(members))))

    def _memory(self, members: Sequence[int]) -> float:
        """How often the chain goes into theirs, with one micro-batch on its way, and no cut in an operator."""
        costs = self.costs
        need = costs.device_bytes(0, costs.chain.count, 1, offload=costs.work.offload and costs.work.train)
        return sum(costs.fleet.providers[p].mem_gib for p in members) * GIB / need

    def _without_slow(self, pipelines: Sequence[Pipeline]) -> Iterator[list[Pipeline]]:
        """Without those whose lines hold all others up when gradients are added: of all beginnings, by estimate the
        best."""
        costs = self.costs
        waits = share_of(costs, pipelines)
        order = sorted(range(len(pipelines)), key=waits.__getitem__)
        best, rate = (math.inf, 0), 0.0
        for kept, at in enumerate(order, start=1):
            rate += 1 / pipelines[at].seconds
            best = min(best, (costs.work.micro_batches / rate + waits[at], kept))
        if best[1] < len(order):
            yield [pipelines[at] for at in order[: best[1]]]


def _counts(most: int) -> list[int]:
    """1, 2, 3, 4, 6, 8, 12, ... and `most`."""
    found = {n for k in range(20) for n in (2**k, 3 * 2**k) if n <= most}
    return sorted({1, *found, most})


def _groups(costs: Costs, row: Sequence[int], count: int) -> list[list[int]]:
    """`count` stretches of `row` of about equal speed."""
    speeds = [costs.fleet.providers[p].flops for p in row]
    share, total = sum(speeds) / count, 0.0
    groups: list[list[int]] = [[] for _ in range(count)]
    for p, speed in zip(row, speeds, strict=True):
        groups[min(count - 1, int((total + speed / 2) / share))].append(p)
        total += speed
    return [group for group in groups if group]


def _line(costs: Costs, p: int) -> float:
    provider = costs.fleet.providers[p]
    return min(provider.up_mbit, provider.down_mbit)


def by_memory(costs: Costs, members: Sequence[int]) -> list[int]:
    """The largest first, as 1F1B asks for: the first stage keeps most micro-batches."""
    return sorted(members, key=lambda p: (-costs.fleet.providers[p].mem_gib, -_line(costs, p)))


ROWS: dict[str, Callable[[Costs, Sequence[int]], list[int]]] = {
    "region, line": lambda costs, members: sorted(
        members, key=lambda p: (costs.fleet.providers[p].region, -_line(costs, p), -costs.fleet.providers[p].mem_gib)
    ),
    "line": lambda costs, members: sorted(
        members, key=lambda p: (-_line(costs, p), costs.fleet.providers[p].region, -costs.fleet.providers[p].mem_gib)
    ),
    "region, speed": lambda costs, members: sorted(
        members, key=lambda p: (costs.fleet.providers[p].region, -costs.fleet.providers[p].flops)
    ),
}
"""Ways to put providers in a row, neighbours in which are to be neighbours in a pipeline."""


def _partitions(members: list[int]) -> Iterator[list[list[int]]]:
    """Every set of disjoint groups of some of `members`, but none at all."""

    def parted(left: list[int]) -> Iterator[list[list[int]]]:
        if not left:
            yield []
            return
        first, rest = left[0], left[1:]
        for count in range(len(rest) + 1):
            for others in itertools.combinations(rest, count):
                remaining = [p for p in rest if p not in others]
                for groups in parted(remaining):
                    yield [[first, *others], *groups]

    for groups in parted(members):
        if len(groups) > 1:
            yield groups


def _short(costs: Costs) -> str:
    """Why nothing holds the chain."""
    work, fleet = costs.work, costs.fleet
    if not costs.usable:
        return f"regions={list(work.regions)}: no provider is there"
    chain = costs.chain
    need = costs.device_bytes(0, chain.count, 1, work.offload and work.train) / GIB
    have = sum(fleet.providers[p].mem_gib for p in costs.usable)
    largest = max(fleet.providers[p].mem_gib for p in costs.usable)
    what = "weights, gradients, optimizer and activations" if work.train else "weights"
    begin = f"{len(costs.usable)} providers cannot hold the model: it needs {need:.2f} GiB for {what}"
    if have < need:
        more = math.ceil((need - have) / largest)
        return (
            f"{begin}, they have {have:.2f}: {need - have:.2f} GiB are missing; {more} more of {largest:g} GiB would do"
        )
    places = chain.places.tolist()
    parts = [costs.device_bytes(i, j, 1, work.offload and work.train) / GIB for i, j in itertools.pairwise(places)]
    worst = max(range(len(parts)), key=parts.__getitem__)
    if parts[worst] > largest:
        name = chain.names[places[worst]]
        return (
            f"{begin}, and operator {name} alone {parts[worst]:.2f} GiB: no provider has more than {largest:g}; one of "
            f"{parts[worst]:.2f} GiB would do"
        )
    ready = any(fleet.providers[p].trusted for p in costs.usable)
    if sum(work.private) and not ready:
        return f"private={list(work.private)}: no provider is trusted"
    most = max(work.in_flight(len(costs.usable)), 1)
    full = costs.device_bytes(0, chain.count, most, work.offload and work.train) / GIB
    return (
        f"{begin}, and with {most} micro-batches on their way up to {full:.2f}; they have {have:.2f}, in parts that no "
        f"cut fits, or behind lines of less than {work.min_mbit:g} Mbit/s; {max(0.0, full - have):.2f} GiB more would "
        "do"
    )
