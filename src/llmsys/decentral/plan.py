"""Which provider runs what: the plan.

    plan(chain, fleet, Workload(...))                        most micro-batches a second
    plan(chain, fleet, Workload(...), objective="latency")   one micro-batch soonest

A plan is one pipeline or several replicas of it, with the providers that are left as spares. Up to six providers every
order of every subset is gone through, and every way to part them into replicas. Of more, providers are put in a row,
by lines, regions or speed, and the row is parted into 1, 2, 3, ... groups, each of which gets the best pipeline that is
found of it (`find`); of many they are dealt out to groups as well (`deal`), and of thousands only that. The best of all
these is taken.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from llmsys.decentral import baselines, schedule
from llmsys.decentral.chain import Chain
from llmsys.decentral.cost import Costs, Workload
from llmsys.decentral.deal import ALIKE, Deal, everything
from llmsys.decentral.find import HURRIED, SEARCHED, Finder
from llmsys.decentral.fleet import GIB, Fleet
from llmsys.decentral.missing import missing
from llmsys.decentral.order import ALL, Pipeline
from llmsys.decentral.parts import ROWS, counts, groups_of, partitions
from llmsys.decentral.score import Score, score, share_of

OF_1F1B = ("eager_1f1b", "1f1b")
FINALISTS, PLAYED = 8, 20_000
"""Plans of a small fleet that are played; micro-batches in stages of a step, beyond which none is."""
MANY, THOUSANDS = 64, 1000
"""Providers of a fleet up to which groups are searched, and not walked alone; up to which they are put in rows."""
POLISHED, PATIENCE, FEWER, IDLE = 2, 2, 0.7, 0.25
"""How many of the ways to part a fleet are searched, if it is no large one; numbers of replicas, each larger than the
last, after which more are not tried where none was better; of what is dealt, each next; of the slowest stage, how much
one that may be left out computes."""
Way = tuple[float, list[list[int]], list[Pipeline]]
"""(micro-batches a second, groups of providers, pipelines of these)."""


@dataclass(frozen=True, kw_only=True)
class Plan:
    """`pipelines` of providers by their place in the fleet, `seconds` of each its slowest stage, or with
    `objective=latency` the sum; `spares`: providers without a stage. `score` of the pipelines, and of small fleets as
    it is played (`Planner.played`). `worth`: micro-batches
    that all providers together were good for by a FLOP, when everything was planned last; 0 where it never was."""

    pipelines: tuple[Pipeline, ...]
    spares: tuple[int, ...]
    score: Score
    objective: str = "throughput"
    worth: float = 0.0

    @property
    def per_s(self) -> float:
        """Micro-batches a second."""
        return self.score.per_s


def plan(
    chain: Chain, fleet: Fleet, work: Workload, objective: str = "throughput", replicas: int | None = None
) -> Plan:
    """The best plan that is found; `replicas`: so many pipelines, and not as many as are best. Pipelines are those with
    the fastest slowest stage; which of them are taken is decided by what a step of all comes to.

    ValueError where no pipeline of the fleet holds the chain: what is missing, and what would suffice."""
    return Planner(Costs(chain, fleet, work), objective).must(replicas)


def scheduled(
    chain: Chain, fleet: Fleet, work: Workload, objective: str = "throughput", replicas: int | None = None
) -> tuple[Planner, Plan]:
    """The same by whichever of `OF_1F1B` does more, and its planner: eager 1F1B hides lines and has less memory for
    operators, which is the better bargain in pipelines that are short or behind thin lines."""
    planners = [Planner(Costs(chain, fleet, dataclasses.replace(work, schedule=name)), objective) for name in OF_1F1B]
    found = [(planner, made) for planner in planners if (made := planner.best(replicas)) is not None]
    if not found:
        planners[-1].must(replicas)
    return max(found, key=lambda each: each[1].per_s)


class Planner:
    """`costs` with what several plans of one fleet share. `thorough`: go through everything where providers are few,
    for tenths of a second; else search as where they are many, for hundredths."""

    def __init__(self, costs: Costs, objective: str = "throughput", *, thorough: bool = True) -> None:
        self.costs, self.objective, self.thorough = costs, objective, thorough
        self.finder = Finder(costs, objective, thorough=thorough)

    def best(self, replicas: int | None = None) -> Plan | None:
        """As `plan`; None where nothing holds the chain."""
        found = self.ranked(replicas)
        if not found:
            return None
        few = self.thorough and len(self.costs.usable) <= HURRIED
        best = max(map(self.played, found[:FINALISTS]), key=lambda each: each.per_s) if few else found[0]
        return dataclasses.replace(best, worth=best.per_s / self.flops)

    def ranked(self, replicas: int | None = None) -> list[Plan]:
        """Those that were looked at, the best first by what a step is priced at."""
        members = self.costs.usable
        if not members or self._memory(members) < 1:
            return []
        if self.objective == "latency":
            one = self.finder.pipeline(members)
            return [] if one is None else [self.made([one])]
        few = self.thorough and len(members) <= ALL
        ways = self._few(members) if few else self._many(members, replicas)
        made = [self.made(way) for way in ways if way and (replicas is None or len(way) == replicas)]
        found = {tuple((each.order, each.cuts) for each in plan.pipelines): plan for plan in made}
        best = sorted((each for each in found.values() if each.per_s > 0), key=lambda each: -each.per_s)
        if best and len(members) <= MANY and (less := self._without_idle(best[0])) is not best[0]:
            best.insert(0, less)
        return best

    @property
    def flops(self) -> float:
        """A second, of all providers together."""
        return sum(self.costs.fleet.providers[p].flops for p in self.costs.usable)

    def must(self, replicas: int | None = None) -> Plan:
        """The same, or ValueError, which says what is missing."""
        found = self.best(replicas)
        if found is not None:
            return found
        one = self.best() if replicas else None
        if one is not None:
            raise ValueError(f"replicas={replicas}: no such plan was found; of these providers {len(one.pipelines)} do")
        looser: dict[str, Any] = {"min_mbit": 0.0, "private": (0, 0), "regions": (), "schedule": "1f1b"}
        for key, off in looser.items():
            asked = getattr(self.costs.work, key)
            free = dataclasses.replace(self.costs, work=dataclasses.replace(self.costs.work, **{key: off}), known={})
            if (
                self.costs.usable
                and asked != off
                and Planner(free, self.objective, thorough=False).best(replicas) is not None
            ):
                raise ValueError(
                    f"{key}={_plain(asked)}: no pipeline of these providers is so; with {_plain(off)} one is"
                )
        raise ValueError(missing(self.costs))

    def made(self, pipelines: Sequence[Pipeline]) -> Plan:
        """A plan of these."""
        if self.objective == "latency":
            result = Score(shares=(1,), step_s=pipelines[0].seconds, sync_s=0.0)
        else:
            result = score(self.costs, pipelines)
            pipelines = [each for each, share in zip(pipelines, result.shares, strict=True) if share]
            result = Score(shares=tuple(s for s in result.shares if s), step_s=result.step_s, sync_s=result.sync_s)
        taken = self.costs.absent.union(*(each.order for each in pipelines))
        spares = tuple(p for p in range(len(self.costs.fleet)) if p not in taken)
        return Plan(pipelines=tuple(pipelines), spares=spares, score=result, objective=self.objective)

    def played(self, plan: Plan) -> Plan:
        """With the step that its schedule makes event by event: lines and stages that are all busy to the brim wait for
        each other's turns, which a price does not know. As it is, where that is too much to play."""
        costs, pairs = self.costs, list(zip(plan.pipelines, plan.score.shares, strict=True))
        turns = sum(share * len(each.order) for each, share in pairs)
        if plan.objective == "latency" or not costs.work.train or turns > PLAYED or plan.score.step_s == math.inf:
            return plan
        steps = (schedule.run(schedule.Timing.of(costs, each), costs.work.schedule, share) for each, share in pairs)
        step_s = max(map(schedule.ends_s, steps)) + plan.score.sync_s
        return dataclasses.replace(plan, score=dataclasses.replace(plan.score, step_s=step_s))

    def _few(self, members: Sequence[int]) -> Iterator[list[Pipeline]]:
        """Every way to part some of them; and what is through soonest, which a step of a few micro-batches is."""
        for parts in partitions(list(members)):
            pipelines = [self.finder.pipeline(part) for part in parts]
            if None not in pipelines:
                yield [each for each in pipelines if each is not None]
        if self.costs.work.train and (soon := self.finder.soonest(members)) is not None:
            yield [soon]
        yield from self._of_others()

    def _alone(self, members: Sequence[int]) -> Iterator[list[Pipeline]]:
        """Those that hold the chain by themselves: the fastest of them, and all."""
        cuts = (0, self.costs.chain.count)
        alone = [Pipeline((p,), cuts, self.costs.slowest_s((p,), cuts)) for p in members]
        alone = sorted((each for each in alone if each.seconds < math.inf), key=lambda each: each.seconds)
        yield from ([each] for each in alone[:1])
        if len(alone) > 1:
            yield from self._enough(alone)

    def _of_others(self) -> Iterator[list[Pipeline]]:
        """As others lay the chain out: what is best by its slowest stage need not be by a step."""
        yield from ([one] for make in baselines.PIPELINES.values() if (one := make(self.costs)) is not None)

    def _without_idle(self, plan: Plan) -> Plan:
        """Without stages that do little, as long as a step is sooner done without them: a faster slowest stage may cost
        more in lines and in waiting than it saves."""
        while True:
            tried = []
            for each in plan.pipelines:
                others = tuple(other for other in plan.pipelines if other is not each)
                stages = self.costs.stages(each.order, each.cuts) or []
                for at, stage in enumerate(stages if len(stages) > 1 else []):
                    less = (*each.order[:at], *each.order[at + 1 :])
                    if stage.compute_s < each.seconds * IDLE and (one := self.finder.along(less)) is not None:
                        tried.append(self.made([*others, one]))
            best = max(tried, key=lambda each: each.per_s, default=plan)
            if best.per_s <= plan.per_s:
                return plan
            plan = best

    def _many(self, members: Sequence[int], replicas: int | None) -> Iterator[list[Pipeline]]:
        """All ways to group them walked, and the pipelines of the best of these searched."""
        most = max(1, min(len(members), int(self._memory(members))))
        numbers = [replicas] if replicas else counts(most)
        if len(members) <= THOUSANDS and numbers[0] == 1 and (one := self.finder.pipeline(members)) is not None:
            yield [one]
        if replicas in (None, len(members), 1):
            yield from self._alone(members)
        if replicas in (None, 1) and len(members) <= HURRIED:
            yield from self._of_others()
        if replicas in (None, 1) and self.thorough and len(members) <= SEARCHED and self.costs.work.train:
            yield from ([one] for one in [self.finder.soonest(members)] if one is not None)
        walked: list[Way] = []
        if len(members) <= THOUSANDS:
            walked += self._in_rows(members, [each for each in numbers if each > 1])
        if len(members) > MANY:
            walked += self._dealt(members, replicas)
        walked.sort(key=lambda each: each[0], reverse=True)
        yield from (some for *_, some in walked[:1])
        if len(members) <= MANY:
            for _, groups, some in walked[: POLISHED if len(members) <= HURRIED else 1]:
                yield [
                    self._polished(each, group) for each in some for group in groups if set(each.order) <= set(group)
                ]

    def _in_rows(self, members: Sequence[int], numbers: Sequence[int]) -> Iterator[Way]:
        """Stretches of rows."""
        for row in ROWS.values():
            order, best, worse = row(self.costs, members), 0.0, 0
            for count in numbers:
                groups = groups_of(self.costs, order, count)
                pipelines = [each for group in groups if (each := self.finder.along(group)) is not None]
                rates = [0.0]
                for some in self._enough(pipelines):
                    rates.append(score(self.costs, some).per_s)
                    yield rates[-1], groups, some
                best, worse = max(best, *rates), 0 if max(rates) > best else worse + 1
                if worse == PATIENCE:
                    break

    def _dealt(self, members: Sequence[int], replicas: int | None) -> Iterator[Way]:
        """Those that are alike: as many groups as would do most if gradients cost nothing, and fewer while that is
        better."""
        deal, seen = Deal(self.costs, self.finder.walk), []
        for alike in [everything] if replicas else ALIKE.values():
            buckets = deal.buckets(members, alike)
            if (parted := sorted(each.members for each in buckets)) in seen:
                continue
            seen.append(parted)
            most, share, best = [replicas] if replicas else deal.counts(buckets), 1.0, 0.0
            while True:
                number = [min(count, max(1, round(count * share))) for count in most]
                pipelines, rates = deal.pipelines(buckets, number), [0.0]
                for some in self._enough(pipelines):
                    rates.append(score(self.costs, some).per_s)
                    yield rates[-1], [], some
                share *= FEWER
                if replicas or max(rates) <= best:
                    break
                best = max(rates)

    def _polished(self, found: Pipeline, group: Sequence[int]) -> Pipeline:
        """The better of a walked pipeline and one that is searched of the same providers."""
        other = self.finder.pipeline(group)
        return other if other is not None and other.seconds < found.seconds else found

    def _enough(self, pipelines: list[Pipeline]) -> Iterator[list[Pipeline]]:
        if pipelines:
            yield pipelines
        if self.costs.work.train and len(pipelines) > 2:
            yield from self._without_slow(pipelines)

    def without(self, p: int) -> Planner:
        """As if the provider at this place had never come; the others keep their places."""
        return Planner(
            dataclasses.replace(self.costs, absent=self.costs.absent | {p}), self.objective, thorough=self.thorough
        )

    def _memory(self, members: Sequence[int]) -> float:
        """How often the chain goes into theirs, with one micro-batch on its way, and no cut in an operator."""
        return sum(self.costs.fleet.providers[p].mem_gib for p in members) * GIB / self.costs.least_bytes

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


def _plain(value: object) -> object:
    return list(value) if isinstance(value, tuple) else value
