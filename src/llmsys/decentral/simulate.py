"""A job on providers that come and go, by a virtual clock: the broker's own code, and a world that answers it.

The world is what `churn` says and what `cost` and `pace` predict. A provider that is told a plan fetches the weights
and the optimizer state that it lacks from those that have them, or where nobody has them any more from a copy that the
job's owner is taken to have: keeping it, and the traffic of that, is not simulated. Then it holds; told to begin, it is
done after its pipeline's share of the step; told to commit, it applies at once. Whoever is hung says nothing until it
wakes, and then says what it would have said, of an epoch that may be past. The broker hears beats every half second,
and that somebody is silent only after its patience.

After every event the broker's promises are checked (`promises`).
"""

from __future__ import annotations

import heapq
import itertools
import math
from collections.abc import Iterator
from dataclasses import dataclass, field

from llmsys.decentral import broker
from llmsys.decentral.broker import Job, State
from llmsys.decentral.churn import Churn, Turn, turns
from llmsys.decentral.events import (
    Beat,
    Began,
    ByProviders,
    Committed,
    Event,
    Held,
    Joined,
    Left,
    Lost,
    Planned,
    Prepared,
)
from llmsys.decentral.fleet import Fleet
from llmsys.decentral.pace import pace
from llmsys.decentral.plan import Plan
from llmsys.decentral.promises import Promises

BEAT_S = 0.5


Said = tuple[Event, dict[int, int]]
"""What is said in the name of providers, and in which of their lives."""


@dataclass(kw_only=True)
class Outcome:
    """Of `seconds` on the virtual clock. `committed` steps; `lost_steps`: of those under way when somebody went, which
    were begun again. `goodput`: micro-batches a second of committed steps; `ideal` with nobody ever gone. Seconds spent
    `computing` steps that were committed, `wasted` on those that were not, `holding` (fetching), and `stuck` without a
    plan. `repairs` by how. `found_s`: from each silence until it was a loss. `usd`, `joule` of all at work."""

    seconds: float = 0.0
    committed: int = 0
    lost_steps: int = 0
    micro_batches: int = 0
    ideal_per_s: float = 0.0
    computing_s: float = 0.0
    wasted_s: float = 0.0
    holding_s: float = 0.0
    stuck_s: float = 0.0
    moved_bytes: float = 0.0
    repairs: dict[str, int] = field(default_factory=dict)
    found_s: list[float] = field(default_factory=list)
    usd: float = 0.0
    joule: float = 0.0

    @property
    def goodput_per_s(self) -> float:
        return self.committed * self.micro_batches / self.seconds if self.seconds else 0.0


def simulate(job: Job, fleet: Fleet, churn: Churn, seconds: float, seed: int, begin: int | None = None) -> Outcome:
    """`begin`: so many of the fleet are there at first; None: all."""
    return World(job, fleet, churn, seconds, seed, begin).run()


class World:
    """One run; `state` is the broker's, all else is what is true."""

    def __init__(
        self, job: Job, fleet: Fleet, churn: Churn, seconds: float, seed: int, begin: int | None = None
    ) -> None:
        self.fleet, self.churn, self.until = fleet, churn, seconds
        self.state = State(job=job)
        self.names = [each.name for each in fleet.providers]
        self.at = {name: place for place, name in enumerate(self.names)}
        initially = range(len(fleet)) if begin is None else range(begin)
        self.up, self.hung, self.slow = set(initially), set[int](), set[int]()
        self.lives = dict.fromkeys(range(len(fleet)), 0)  # how often each has gone: what an earlier one said is lost
        self.waiting: dict[int, list[Event]] = {}  # what the hung will say
        self.spans: dict[int, tuple[int, int]] = {}  # operators that each has the parameters of
        self.planned: dict[int, tuple[int, int]] = {}  # and is to have, by the plan
        self.promises = Promises()
        self.beaten_s = -math.inf
        self.silent_s: dict[str, float] = {}
        self.outcome = Outcome(seconds=seconds, micro_batches=job.work.micro_batches)
        self.churning = turns(len(fleet), churn, seed, initially)
        self.queue: list[tuple[float, int, Turn | Said | None]] = []
        self.numbers = itertools.count()
        self.began_s = self.since_s = self.since_plan_s = 0.0

    def run(self) -> Outcome:
        """Until the time is over."""
        for place in sorted(self.up):
            self._hear(Joined(at_s=0.0, provider=self.fleet.providers[place]))
        self._settle(0.0)
        if self.state.plan is not None:
            self.outcome.ideal_per_s = self.state.plan.per_s
        self._next_turn()
        while self.queue:
            now, _, given = heapq.heappop(self.queue)
            if now > self.until:
                break
            if isinstance(given, Turn):
                self._turn(given)
                self._next_turn()
            elif given is not None:
                self._deliver(*given, now)
            self._settle(now)
        self._charge(self.until, self.state.plan)
        return self.outcome

    # --- what happens to providers ---

    def _turn(self, turn: Turn) -> None:
        place, now, name = turn.place, turn.at_s, self.names[turn.place]
        if turn.what in ("slows", "recovers"):
            (self.slow.add if turn.what == "slows" else self.slow.discard)(place)
        elif turn.what == "hangs":
            self.hung.add(place)
            self._silent(name, now)
        elif turn.what == "wakes":
            self.hung.discard(place)
            self.silent_s.pop(name, None)
            self._hear(Beat(at_s=now, names=frozenset({name})))
            for event in self.waiting.pop(place, []):
                self._hear(event)
            if name not in self.state.present:  # it has been given up, and begins as anybody who comes
                self._hear(Joined(at_s=now, provider=self.fleet.providers[place]))
        elif turn.what == "joins":
            self.up.add(place)
            self._hear(Joined(at_s=now, provider=self.fleet.providers[place]))
        else:
            self.up.discard(place)
            self.slow.discard(place)
            self.spans.pop(place, None)
            self.lives[place] += 1
            if turn.what == "leaves":
                self._hear(Left(at_s=now, name=name))
            else:
                self._silent(name, now)

    def _silent(self, name: str, now: float) -> None:
        """The broker is to look when its patience is over."""
        self.silent_s[name] = now
        self._push(now + self.state.job.patience_s + BEAT_S)

    def _deliver(self, event: Event, lives: dict[int, int], now: float) -> None:
        """What providers say: those that still live; those that hang say it later."""
        assert isinstance(event, ByProviders)
        there = {place for place, life in lives.items() if self.lives[place] == life}
        for place in there & self.hung:
            self.waiting.setdefault(place, []).append(self._of(event, {place}, now))
        speaking = there - self.hung
        self.promises.said(event, (self.names[place] for place in there))
        if isinstance(event, Held) and event.epoch == self.state.epoch:
            self.spans |= {place: self.planned[place] for place in there if place in self.planned}
        if speaking:
            self._hear(self._of(event, speaking, now))

    def _of(self, event: ByProviders, places: set[int], now: float) -> Event:
        return type(event)(at_s=now, names=frozenset(self.names[p] for p in places), epoch=event.epoch, step=event.step)

    # --- what the broker hears and says ---

    def _hear(self, event: Event) -> None:
        self.state = broker.apply(self.state, event)

    def _settle(self, now: float) -> None:
        last_s = math.floor(now / BEAT_S) * BEAT_S
        if last_s > self.beaten_s:
            self._hear(Beat(at_s=last_s, names=frozenset(self.names[place] for place in self.up - self.hung)))
            self.beaten_s = last_s
        while said := broker.decide(self.state, now):
            for event in said:
                before = self.state
                self.promises.check(event, before, {self.names[place] for place in self.up - self.hung})
                self._hear(event)
                self._follow(event, before, now)

    def _follow(self, event: Event, before: State, now: float) -> None:
        """What the world does when the broker says something."""
        if isinstance(event, Planned):
            self._charge(now, before.plan)
            if before.phase == broker.COMPUTING:
                self.outcome.lost_steps += 1
                self.outcome.wasted_s += now - self.began_s
            elif before.plan is not None:
                self.outcome.holding_s += now - self.since_s
            self.since_s = now
            self.outcome.repairs[event.how] = self.outcome.repairs.get(event.how, 0) + 1
            self.outcome.moved_bytes += event.moved_bytes
            if event.plan is not None:
                self._fetch(event.plan, event.epoch, now)
        elif isinstance(event, Lost):
            self.outcome.found_s.append(now - self.silent_s.pop(event.name, now))
        elif isinstance(event, Began):
            self.outcome.holding_s += now - self.since_s
            self.began_s = now
            assert self.state.plan is not None
            lives = self._lives(self.state.plan)
            done = Prepared(at_s=now, names=frozenset(), epoch=event.epoch, step=event.step)
            self._push(now + self._step_s(self.state.plan), (done, lives))
        elif isinstance(event, Committed):
            self.outcome.committed += 1
            self.spans = dict(self.planned)  # who is in no stage has parameters that are old now
            self.outcome.computing_s += now - self.began_s
            self.since_s = now
            assert self.state.plan is not None
            held = Held(at_s=now, names=frozenset(), epoch=event.epoch, step=event.step)
            self._push(now, (held, self._lives(self.state.plan)))

    def _fetch(self, plan: Plan, epoch: int, now: float) -> None:
        """Each owner gets what it lacks over its own line, and holds; those at once that lack nothing."""
        costs = self.state.costs
        state = 1 + (costs.work.optimizer if costs.work.train else 0.0)
        self.planned = {self._place(p): span for p, span in _spans(plan).items()}
        soon: dict[float, dict[int, int]] = {}
        for place, (begin, end) in self.planned.items():
            low, high = self.spans.get(place, (begin, begin))
            inside = (max(begin, low), min(end, high))
            kept = float(costs.weights[inside[1]] - costs.weights[inside[0]]) if inside[0] < inside[1] else 0.0
            nbytes = (float(costs.weights[end] - costs.weights[begin]) - kept) * state
            seconds = self._fetch_s(place, (begin, end), nbytes) if nbytes else 0.0
            soon.setdefault(seconds, {})[place] = self.lives[place]
        held = Held(at_s=now, names=frozenset(), epoch=epoch, step=self.state.step)
        for seconds, lives in soon.items():
            self._push(now + seconds, (held, lives))

    def _fetch_s(self, place: int, span: tuple[int, int], nbytes: float) -> float:
        """From the others that have some of these operators, each over its line out, all of them at once, and over the
        one line in. Where nobody has them any more they come from the job's owner, whose line is not the slower one."""
        providers, joint = self.fleet.providers, self.fleet.joint
        there = self.up - self.hung
        having = (other for other, (begin, end) in self.spans.items() if begin < span[1] and span[0] < end)
        some = [other for other in having if other in there and other != place]
        out = sum(min(providers[other].up_mbit, joint(other, place).mbit) for other in some) or math.inf
        wait = max((self.fleet.alpha_s(other, place) for other in some), default=0.0)
        return wait + nbytes * 8e-6 / min(out, providers[place].down_mbit)

    def _step_s(self, plan: Plan) -> float:
        """With whoever is slow now."""
        costs, ends = self.state.costs, [0.0]
        for each, share in zip(plan.pipelines, plan.score.shares, strict=True):
            slow = (
                [self.churn.slowdown if self._place(p) in self.slow else 1.0 for p in each.order] if self.slow else []
            )
            ends.append(pace(costs, each.order, each.cuts, slow).step_s(share))
        return max(ends) + plan.score.sync_s

    def _charge(self, now: float, plan: Plan | None) -> None:
        """For the time since `plan` was made."""
        spent = now - self.since_plan_s
        self.since_plan_s = now
        if plan is None:
            self.outcome.stuck_s += spent
            return
        for p in _spans(plan):
            provider = self.state.providers[p]
            self.outcome.usd += (provider.usd_per_hour or 0.0) * spent / 3600
            self.outcome.joule += (provider.watts or 0.0) * spent

    # --- places: the broker numbers providers as they join, the world as they are in its fleet ---

    def _place(self, p: int) -> int:
        return self.at[self.state.providers[p].name]

    def _lives(self, plan: Plan) -> dict[int, int]:
        return {self._place(p): self.lives[self._place(p)] for p in _spans(plan)}

    def _push(self, at_s: float, given: Turn | Said | None = None) -> None:
        """A turn, what somebody says, or nothing but that the broker looks."""
        heapq.heappush(self.queue, (at_s, next(self.numbers), given))

    def _next_turn(self) -> None:
        turn = next(self.churning)
        self._push(turn.at_s, turn)


def _spans(plan: Plan) -> dict[int, tuple[int, int]]:
    """Operators of each provider that has a stage, by its place with the broker."""
    pairs: Iterator[tuple[int, tuple[int, int]]] = (
        (p, span) for each in plan.pipelines for p, span in zip(each.order, itertools.pairwise(each.cuts), strict=True)
    )
    return dict(pairs)
