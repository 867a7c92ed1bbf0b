"""Who is there, who does what, and which step counts: the broker's state, and what follows from it.

Two pure functions. `apply` adds an event to a state; `decide` says what has to happen next, as events again, by a few
rules in order, the first that has something to say:

    lost        who has not been heard of for `patience_s` is lost
    planned     where there is no plan, or one of its providers has gone, a new epoch begins with a plan that is mended
    committed   when all have prepared a step it is committed, and each applies its update
    began       when all hold the state after the last committed step, the next one begins

A step is so done in two phases, and a provider that goes in between costs the step under way and no other: before the
commit nothing has been applied anywhere, and after it each update is certain, and is applied once, by its number, by
whoever has the stage then. Providers that are in no stage are the backup pool: the first to be asked.

Time comes in as an argument and randomness not at all, so that the simulator, tests and real brokers run the same code.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Self

from llmsys.decentral.chain import Chain
from llmsys.decentral.cost import Costs, Workload
from llmsys.decentral.events import (
    Beat,
    Began,
    Committed,
    Event,
    Held,
    Joined,
    Left,
    Lost,
    Planned,
    Prepared,
)
from llmsys.decentral.fleet import Between, Fleet, Provider
from llmsys.decentral.known import Known
from llmsys.decentral.plan import Plan, Planner
from llmsys.decentral.repair import after_join, after_quit

PATIENCE_S = 1.5
"""Three beats of half a second."""
HOLDING, COMPUTING = "holding", "computing"


@dataclass(frozen=True, kw_only=True)
class Job:
    """What is planned for; it never changes. Nothing begins before `least` providers are there; of those that are,
    `reserve` are left in the backup pool where the others hold the model. `name`: by which providers tell this job
    from one that they had before."""

    chain: Chain
    work: Workload
    between: Mapping[tuple[str, str], Between] = field(default_factory=dict)
    other: Between = field(default_factory=Between)
    patience_s: float = PATIENCE_S
    least: int = 1
    reserve: int = 0
    name: str = ""


@dataclass(frozen=True, kw_only=True)
class State:
    """`providers`: all that have ever joined, so that each keeps its place; `absent` of them, `present` the others by
    name. `heard_s`: when each was last heard of, nobody that is there before `quiet_s`. `owners`: who has a stage;
    `gone`: places of those who had one when they went. `step`: the last that is committed. `phase`: owners of stages
    fetch what they need to hold the state after `step` (holding), or compute the next one (computing); `said`: which of
    them are done with that. `fresh`: places of those that have joined since the plan was made. `stuck`: nothing held
    the model, and nobody has come since. `places` by name; `known`: as of `Costs`. Sets that could be computed from
    others are kept, as there are thousands in them."""

    job: Job
    providers: tuple[Provider, ...] = ()
    absent: frozenset[int] = frozenset()
    present: frozenset[str] = frozenset()
    heard_s: Mapping[str, float] = field(default_factory=dict)
    quiet_s: float = math.inf
    plan: Plan | None = None
    owners: frozenset[str] = frozenset()
    gone: tuple[int, ...] = ()
    epoch: int = 0
    step: int = 0
    phase: str = HOLDING
    said: frozenset[str] = frozenset()
    fresh: tuple[int, ...] = ()
    stuck: bool = False
    places: Mapping[str, int] = field(default_factory=dict)
    known: Known = field(default_factory=Known, compare=False, repr=False)

    @property
    def done(self) -> bool:
        """Whether all owners are."""
        return self.plan is not None and len(self.said) == len(self.owners)

    def place(self, name: str) -> int | None:
        """Of a provider that has joined at some time."""
        return self.places.get(name)

    @property
    def costs(self) -> Costs:
        fleet = Fleet(providers=self.providers, between=self.job.between, other=self.job.other)
        return Costs(self.job.chain, fleet, self.job.work, self.absent, known=self.known)

    def with_(self, **changes: object) -> Self:
        return dataclasses.replace(self, **changes)  # type: ignore[arg-type]


def apply(state: State, event: Event) -> State:
    """The state after an event. What is said of another epoch or step, or by somebody who has gone, changes nothing;
    nor does a provider that leaves and is not there. One that joins and is there has gone and come again."""
    match event:
        case Joined(provider=provider):
            return _joined(state, provider, event.at_s)
        case Left(name=name) | Lost(name=name):
            return _without(state, name)
        case Beat(names=names):
            there = {name: max(event.at_s, state.heard_s[name]) for name in names & state.present}
            heard = {**state.heard_s, **there}
            return state.with_(heard_s=heard, quiet_s=min((heard[name] for name in state.present), default=math.inf))
        case Planned(epoch=epoch, plan=plan):
            orders = () if plan is None else tuple(each.order for each in plan.pipelines)
            owners = frozenset(state.providers[p].name for order in orders for p in order)
            named = {p for order in orders for p in order}.union(() if plan is None else plan.spares)
            fresh = tuple(p for p in state.fresh if p not in named) if state.plan is not None else ()
            new = state.with_(epoch=epoch, plan=plan, phase=HOLDING, said=frozenset(), owners=owners, gone=())
            return new.with_(fresh=fresh, stuck=plan is None and not fresh)
        case Held(names=names, epoch=state.epoch, step=state.step) if state.phase == HOLDING:
            return state.with_(said=state.said | (names & state.owners & state.present))
        case Prepared(names=names, epoch=state.epoch, step=step) if (state.phase, step) == (COMPUTING, state.step + 1):
            return state.with_(said=state.said | (names & state.owners & state.present))
        case Began(epoch=state.epoch):
            return state.with_(phase=COMPUTING, said=frozenset())
        case Committed(epoch=state.epoch, step=step):
            return state.with_(step=step, phase=HOLDING, said=frozenset())
    return state


def decide(state: State, now: float) -> tuple[Event, ...]:
    """What follows from the state at the time `now`; nothing, where everybody is at work. To be applied, and asked
    again until there is nothing more."""
    for rule in (_lost, _planned, _committed, _began):
        if found := rule(state, now):
            return found
    return ()


def _without(state: State, name: str) -> State:
    place = state.place(name)
    if place is None or name not in state.present:
        return state
    gone = (*state.gone, place) if name in state.owners else state.gone
    return state.with_(absent=state.absent | {place}, present=state.present - {name}, gone=gone, stuck=False)


def _joined(state: State, provider: Provider, at_s: float) -> State:
    state = _without(state, provider.name)  # who joins and is there has begun anew, and holds nothing any more
    heard = {**state.heard_s, provider.name: at_s}
    place, places, known = state.place(provider.name), state.places, state.known
    if place is None:
        place, providers = len(state.providers), (*state.providers, provider)
        places = {**places, provider.name: place}
    else:
        known = known if provider == state.providers[place] else Known()
        providers = (*state.providers[:place], provider, *state.providers[place + 1 :])
    return state.with_(
        providers=providers,
        absent=state.absent - {place},
        present=state.present | {provider.name},
        heard_s=heard,
        quiet_s=min(state.quiet_s, at_s),
        fresh=(*(p for p in state.fresh if p != place), place),
        stuck=False,
        places=places,
        known=known,
    )


def _lost(state: State, now: float) -> tuple[Event, ...]:
    late = now - state.job.patience_s
    if state.quiet_s >= late:
        return ()
    return tuple(Lost(at_s=now, name=name) for name in sorted(state.present) if state.heard_s[name] < late)


def _planned(state: State, now: float) -> tuple[Event, ...]:
    """A plan where there is none that all of its owners are there for; joined ones are asked in between steps."""
    if state.stuck or (state.epoch == 0 and 0 < len(state.present) < state.job.least):
        return ()
    if not state.present:
        nobody = Planned(at_s=now, epoch=state.epoch + 1, plan=None)
        return () if state.plan is None else (nobody,)
    if state.plan is not None and not state.gone:
        return _welcomed(state, now) if state.fresh and state.done and state.phase == HOLDING else ()
    planner = Planner(dataclasses.replace(state.costs, absent=state.absent - frozenset(state.gone)), thorough=False)
    plan, how, moved = state.plan, "plan", 0.0
    try:
        for p in state.gone:
            assert plan is not None
            if p not in {*plan.spares, *(q for each in plan.pipelines for q in each.order)}:
                continue
            planner, mended = after_quit(planner, plan, p)
            plan, how, moved = mended.plan, mended.how, moved + mended.moved_bytes
        if state.plan is None:
            plan = _with_reserve(state) or planner.best()
    except ValueError:
        plan = None  # nothing holds the model until somebody joins
    return (Planned(at_s=now, epoch=state.epoch + 1, plan=plan, how=how, moved_bytes=moved),)


def _with_reserve(state: State) -> Plan | None:
    """A plan of all but the slowest; None where the others do not hold the model, or none are to be left out."""
    costs, count = state.costs, state.job.reserve
    there = sorted(costs.usable, key=lambda p: (costs.fleet.providers[p].flops, -p))
    pool = there[:count]
    if not pool or len(there) <= count:
        return None
    found = Planner(dataclasses.replace(costs, absent=state.absent | set(pool)), thorough=False).best()
    return None if found is None else dataclasses.replace(found, spares=(*found.spares, *pool))


def spared(state: State, name: str) -> bool:
    """Whether somebody has a stage, and the others hold the model without it."""
    place, costs = state.place(name), state.costs
    if place is None or name not in state.owners:
        return False
    others = dataclasses.replace(costs, absent=costs.absent | {place})
    return Planner(others, thorough=False).best() is not None


def _welcomed(state: State, now: float) -> tuple[Event, ...]:
    """The plan with those that have joined: in a new epoch where one of them has a stage now, else as spares."""
    assert state.plan is not None
    used = {p for each in state.plan.pipelines for p in each.order}
    spares = [p for p in range(len(state.providers)) if p not in state.absent and p not in used]
    plan = dataclasses.replace(state.plan, spares=tuple(p for p in spares if p != state.fresh[-1]))
    if len(plan.spares) < state.job.reserve:
        plan = dataclasses.replace(plan, spares=(*plan.spares, state.fresh[-1]))
        return (Planned(at_s=now, epoch=state.epoch + 1, plan=plan, how="none"),)
    found = after_join(Planner(state.costs, thorough=False), plan, state.fresh[-1])
    return (Planned(at_s=now, epoch=state.epoch + 1, plan=found.plan, how=found.how, moved_bytes=found.moved_bytes),)


def _committed(state: State, now: float) -> tuple[Event, ...]:
    if state.phase != COMPUTING or not state.done:
        return ()
    return (Committed(at_s=now, epoch=state.epoch, step=state.step + 1),)


def _began(state: State, now: float) -> tuple[Event, ...]:
    if state.phase != HOLDING or not state.done:
        return ()
    return (Began(at_s=now, epoch=state.epoch, step=state.step + 1),)
