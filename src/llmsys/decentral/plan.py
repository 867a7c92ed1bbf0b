"""Which provider runs what: the plan.

    plan(chain, fleet, Workload(...))                        most micro-batches a second
    plan(chain, fleet, Workload(...), objective="latency")   one micro-batch soonest

A plan is one pipeline or several replicas of it, with the providers that are left as spares. Of many ways to part the
fleet (`ways`) into pipelines (`find`) the one is taken with which a step of all takes least (`score`); of small fleets
the best of these are played event by event (`schedule`), and the fastest is taken.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from llmsys.decentral import schedule
from llmsys.decentral.chain import Chain
from llmsys.decentral.cost import Costs, Workload
from llmsys.decentral.find import HURRIED, Finder
from llmsys.decentral.fleet import Fleet
from llmsys.decentral.known import Known
from llmsys.decentral.missing import missing
from llmsys.decentral.order import Pipeline
from llmsys.decentral.score import Score, score
from llmsys.decentral.ways import MANY, Ways

OF_1F1B = ("eager_1f1b", "1f1b")
FINALISTS, PLAYED, IDLE = 8, 20_000, 0.25
"""Plans of a small fleet that are played; micro-batches in stages of a step, beyond which none is; of the slowest
stage, how much one that may be left out computes."""


@dataclass(frozen=True, kw_only=True)
class Plan:
    """`pipelines` of providers by their place in the fleet, `seconds` of each its slowest stage, or with
    `objective=latency` the sum; `spares`: providers without a stage. `score` of the pipelines, and of small fleets as
    it is played (`Planner.played`). `worth`: micro-batches that all providers together were good for by a FLOP, when
    everything was planned last; 0 where it never was."""

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
    """The best plan that is found; `replicas`: so many pipelines, and not as many as are best.

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
        if self.objective == "latency":
            one = self.finder.pipeline(members) if members else None
            return [] if one is None else [self.made([one])]
        ways = Ways(self.finder).of(members, replicas)
        most = self.costs.work.most or math.inf
        made = [self.made(way) for way in ways if way and len(way) <= most and replicas in (None, len(way))]
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
            if asked == off or not self.costs.usable:
                continue
            work = dataclasses.replace(self.costs.work, **{key: off})
            free = dataclasses.replace(self.costs, work=work, known=Known())
            if Planner(free, self.objective, thorough=False).best(replicas) is not None:
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

    def without(self, p: int) -> Planner:
        """As if the provider at this place had never come; the others keep their places."""
        return Planner(
            dataclasses.replace(self.costs, absent=self.costs.absent | {p}), self.objective, thorough=self.thorough
        )


def _plain(value: object) -> object:
    return list(value) if isinstance(value, tuple) else value
