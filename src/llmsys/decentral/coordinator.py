"""The broker at work: its pure core (`broker`), given a job, a wire and a log of events.

Frames come and go, time is an argument, and nothing else is touched: whoever drives a `Coordinator` hands it what
providers say and lets it look at the clock. What the core decides is written to the log before anybody is told, so that
a broker that dies is rebuilt from it. What providers have, it is told by them with each new plan, and is not kept.

Of a new plan the owners of stages get what they lack from whoever has it: other owners, those that keep copies, or, in
the beginning, the broker. What nobody has as it is after the last committed step is computed again, from a copy that is
older and from what the neighbours of a lost stage had sent it: by the provider that has most use for it, while all
others wait, and do nothing twice.
"""

from __future__ import annotations

import collections
import dataclasses
import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from llmsys.decentral import broker
from llmsys.decentral.broker import State
from llmsys.decentral.chain import Chain
from llmsys.decentral.cutting import Cutting, lost, sources
from llmsys.decentral.events import Beat, Began, Committed, Event, Held, Joined, Left, Lost, Planned, Prepared
from llmsys.decentral.fleet import Provider
from llmsys.decentral.graph import Graph
from llmsys.decentral.plan import Plan
from llmsys.decentral.planes import PARAMETER, VARIABLE, Arrays, Rules
from llmsys.decentral.provider import BROKER, Place
from llmsys.decentral.stage_work import INPUT, KINDS
from llmsys.decentral.wire import Frame, Malformed, decode, encode, header


@dataclass(frozen=True, kw_only=True, eq=False)
class Training:
    """What is trained: `graph` with `tensors` (by key) as they are in the beginning; `data` of a step, one mapping for
    each micro-batch; `steps` of it, each with its `rate`; gradients clipped to a norm of `clip` (0: not at all). Of
    each stage's state `copies` are kept by others, of every `copy_every`-th step."""

    graph: Graph
    chain: Chain
    tensors: Arrays
    rules: Rules
    data: Callable[[int], Sequence[Arrays]]
    steps: int
    rate: Callable[[int], float]
    clip: float = 0.0
    copies: int = 2
    copy_every: int = 1


@dataclass(kw_only=True)
class Update:
    """A committed step: what each stage applied, and the losses of its micro-batches."""

    rate: float
    scale: float
    losses: tuple[float, ...]

    @property
    def loss(self) -> float:
        return sum(self.losses) / len(self.losses)


@dataclass(kw_only=True)
class Told:
    """What providers have said since the epoch began; `plan`: who has been told of it."""

    plan: set[str] = field(default_factory=set)
    holds: dict[str, set[str]] = field(default_factory=dict)
    stages: dict[Place, str] = field(default_factory=dict)
    copies: dict[Place, dict[int, set[str]]] = field(default_factory=dict)
    since: dict[Place, int] = field(default_factory=dict)
    asked: dict[str, set[str]] = field(default_factory=dict)
    copying: bool = False
    reviving: dict[int, str] = field(default_factory=dict)
    squares: dict[str, float] = field(default_factory=dict)
    losses: tuple[float, ...] = ()


RELAYED = frozenset({*KINDS, "state"} - {INPUT})
"""What providers say to each other."""


class JobLost(RuntimeError):
    """Nobody has what the job needs to go on, and nobody can compute it again."""


Note = Callable[[Event, Mapping[str, Any]], None]
BACK_S = 10.0
"""How long a broker that was rebuilt waits for providers to dial again."""


class Coordinator:
    """`note` is called with each event, and what goes with it, before anybody is told."""

    def __init__(self, job: broker.Job, training: Training, note: Note = lambda event, more: None) -> None:
        self.training, self.note = training, note
        self.state = State(job=job)
        self.lives: dict[str, str] = {}
        self.asked: set[str] = set()  # to be let go
        self.leaving: dict[str, float] = {}  # without a stage, and still there to hand it over; heard of when
        self.cutting: Cutting | None = None
        self.base: Cutting | None = None  # by which the last step was computed
        self.cuttings: dict[int, Cutting] = {}
        self.updates: dict[int, Update] = {}
        self.told = Told()
        self.keepers: dict[str, list[str]] = {}
        self.safe = 0
        self.out: list[tuple[str, bytes]] = []
        self.counters = {"malformed": 0, "foreign": 0, "stale": 0, "refused": 0, "relayed": 0}
        self.refusals: collections.deque[str] = collections.deque(maxlen=10)
        self.tasks: dict[str, int] = {}
        self.again = 0  # steps that were under way when a plan ended
        self.begun_s = 0.0  # on the clock of the job
        self.awaited: set[str] | None = None  # who is to dial again, of a broker that was rebuilt

    def rebuild(self, noted: Iterable[tuple[Event, Mapping[str, Any]]], now: float) -> None:
        """As the broker was that noted these, whose clock is now at `now`. Its providers are to dial again; those that
        do not are lost."""
        self.begun_s = now
        for event, more in noted:
            if isinstance(event, Joined):
                self.lives[event.provider.name] = str(more["life"])
            if isinstance(event, Committed):
                self.updates[event.step] = Update(**{**more, "losses": tuple(more["losses"])})
            before, self.state = self.state, broker.apply(self.state, event)
            if isinstance(event, Planned):
                self.again += before.phase == broker.COMPUTING
                self._cut()
            elif isinstance(event, Began):
                self._based()
        self.awaited = set(self.state.present)
        self.state = broker.apply(self.state, Beat(at_s=now + BACK_S, names=self.state.present))

    @property
    def finished(self) -> bool:
        return self.state.step >= self.training.steps and self.state.done

    # --- what comes ---

    def join(self, provider: Provider, life: str, now: float) -> None:
        """A provider that has come, has begun anew, or is back from before the broker was rebuilt."""
        awaited = self.awaited or set()
        back = provider.name in awaited and self.lives[provider.name] == life
        awaited.discard(provider.name)
        self.leaving.pop(provider.name, None)
        if not back:
            self.lives[provider.name] = life
            self._event(Joined(at_s=now, provider=provider), life=life)

    def gone(self, name: str, now: float) -> None:
        """Somebody's connection is closed, and will not come back."""
        if name in self.state.present:
            self._event(Lost(at_s=now, name=name))
        self.leaving.pop(name, None)

    def dismiss(self, name: str) -> None:
        """There is nothing left to do."""
        self._tell(name, "stop")

    def beat(self, name: str, now: float) -> None:
        if name in self.leaving:
            self.leaving[name] = now
        if name not in (self.awaited or ()):
            self.state = broker.apply(self.state, Beat(at_s=now, names=frozenset({name})))

    def hear(self, sender: str, data: bytes, now: float) -> None:
        """Bytes from a provider, which is known to be `sender`."""
        self.beat(sender, now)
        try:
            head = header(data)
            if head["sender"] != sender:
                raise Malformed(f"a frame of {head['sender']}, from {sender}")
            if head["kind"] in RELAYED and head["to"] != BROKER:
                self._relay(head, data)
                return
            frame = decode(data)
        except Malformed:
            self.counters["malformed"] += 1
            return
        if frame.to != BROKER:
            self.counters["foreign"] += 1
            return
        if frame.kind == "beat":
            return
        if frame.kind == "leave":
            self.asked.add(sender)
        elif frame.epoch != self.state.epoch:
            self.counters["stale"] += 1
        else:
            try:
                self._said(frame, now)
            except (ValueError, KeyError, TypeError, AttributeError, IndexError) as error:
                self.counters["refused"] += 1
                self.refusals.append(f"{sender}: {frame.kind}: {type(error).__name__}: {error}")

    def _relay(self, head: Mapping[str, Any], data: bytes) -> None:
        """Only in this epoch, and only to somebody who is there."""
        if head["epoch"] != self.state.epoch:
            self.counters["stale"] += 1
        elif head["to"] in self.state.present or head["to"] in self.leaving:
            self.counters["relayed"] += 1
            self.out.append((head["to"], data))

    def _said(self, frame: Frame, now: float) -> None:
        body, name, told = frame.body, frame.sender, self.told
        if frame.kind == "have":
            holds = told.holds.setdefault(name, set())
            for number, index, since, lacks in body["stages"]:
                if number in self.cuttings:  # else it is of a plan that nobody asks for any more
                    if since >= 0:
                        told.stages[number, index] = name
                        told.since[number, index] = int(since)
                    holds |= self.cuttings[number].names[index] - set(lacks)
            for number, index, steps in body["copies"]:
                if number in self.cuttings:
                    for step in steps:
                        told.copies.setdefault((number, index), {}).setdefault(int(step), set()).add(name)
                    if frame.step in steps:
                        holds |= self.cuttings[number].names[index]
            self._move()
        elif frame.kind == "revived":
            place = (int(body["cutting"]), int(body["stage"]))
            told.stages[place], told.since[place] = name, int(body["since"])
            told.holds[name] |= self.cuttings[place[0]].names[place[1]]
            self._move()
        elif frame.kind == "copied":
            place = (int(body["cutting"]), int(body["stage"]))
            told.copies.setdefault(place, {}).setdefault(frame.step, set()).add(name)
            self._holding(now)
        elif frame.kind == "held":
            assert self.cutting is not None
            told.since[self.cutting.number, self.owners.index(name)] = int(body["since"])
            self._event(Held(at_s=now, names=frozenset({name}), epoch=frame.epoch, step=frame.step))
        elif frame.kind == "prepared":
            told.squares |= {str(key): float(value) for key, value in body["squares"].items()}
            if body["losses"]:
                told.losses = tuple(float(each) for each in body["losses"])
            self._event(Prepared(at_s=now, names=frozenset({name}), epoch=frame.epoch, step=frame.step))
        else:
            raise ValueError(f"{frame.kind}: no such frame")

    # --- what follows ---

    def tick(self, now: float) -> None:
        """Everything that follows from what has come, and from the time."""
        if self.awaited is not None and not self._all_back(self.awaited, now):
            return
        if self.asked and self.state.phase == broker.HOLDING and self.state.done:  # a step under way is not given up
            for name in sorted(self.asked & self.state.present):
                self.leaving[name] = now
                self._event(Left(at_s=now, name=name))
            self.asked.clear()
        self._replaced(now)
        while not self.finished and (events := self._decided(now)):
            for event in events:
                before = self.state
                if isinstance(event, Committed):
                    self.updates[event.step] = self._update(event.step)
                    self._event(event, **dataclasses.asdict(self.updates[event.step]))
                else:
                    self._event(event)
                self._follow(event, before)

    def _all_back(self, awaited: set[str], now: float) -> bool:
        """Whether all have dialled again whom a broker that was rebuilt has known; then all begin in a new epoch."""
        for event in broker.decide(self.state, now):
            if isinstance(event, Lost):
                self._event(event)
        awaited &= self.state.present
        if awaited:
            return False
        self.awaited = None
        self.state = broker.apply(self.state, Beat(at_s=now, names=self.state.present))
        if self.state.plan is not None and not self.state.gone:
            if self.state.step and self.base is self.cutting:
                self._commit(self.state.step)  # for whoever had not been told when the broker died
            self._again(now, self.state.plan)
        return True

    def _again(self, now: float, plan: Plan) -> None:
        """The same plan, in a new epoch: all say anew what they have."""
        spares = tuple(p for p in plan.spares if p not in self.state.absent)
        same = dataclasses.replace(plan, spares=spares)
        before = self.state
        event = Planned(at_s=now, epoch=self.state.epoch + 1, plan=same, how="none")
        self._event(event)
        self._follow(event, before)

    def _replaced(self, now: float) -> None:
        """Those who have gone and had no stage: others keep what they kept; and where somebody waited for what they
        were to give, all begin again, in a new epoch."""
        plan, there = self.state.plan, self.state.present
        patience_s = self.state.job.patience_s
        self.leaving = {name: at_s for name, at_s in self.leaving.items() if at_s >= now - patience_s}
        lost = set(self.told.holds) - there - set(self.leaving)
        keeping = {name for names in self.keepers.values() for name in names}
        if plan is None or self.state.gone or not (lost or keeping - there):
            return
        for name in lost:
            del self.told.holds[name]
        keepers = self._keepers()
        if lost and self.state.phase == broker.HOLDING and not self.state.done:
            self._again(now, plan)
        elif keepers != self.keepers:
            self.keepers, self.told.copying = keepers, False
            for name, names in keepers.items():
                self._tell(name, "keepers", body={"keepers": names})

    def _decided(self, now: float) -> tuple[Event, ...]:
        found = broker.decide(self.state, now)
        if found and isinstance(found[0], Began) and not self._guarded():
            return ()
        return found

    def _holding(self, now: float) -> None:
        """The safe step has grown, perhaps."""
        if self.cutting is not None:
            steps = [set(self.told.copies.get((self.cutting.number, at), {})) for at in range(len(self.cutting.stages))]
            self.safe = max(self.safe, *(set.intersection(*steps) or {0}))

    def _guarded(self) -> bool:
        """Whether whatever stage is lost could be computed again: of some step each has a copy with somebody else than
        its owner, and all that was sent since is still there. Nobody begins a step before; alone there is nobody
        else. Asks for copies where they are needed."""
        assert self.cutting is not None
        order, told = self.owners, self.told
        if len(self.state.present) == 1 or self._common([*range(len(order))]) is not None:
            return True
        if not told.copying:
            told.copying = True
            for name in order:
                self._tell(name, "copy")
        return False

    def _common(self, stages: Sequence[int]) -> int | None:
        """The last step of which all these stages, as the model is cut now, have copies with others that are there,
        and that no owner of the others has begun after."""
        assert self.cutting is not None
        number, told, order = self.cutting.number, self.told, self.owners
        steps = [
            {
                at
                for at, who in told.copies.get((number, index), {}).items()
                if who & self.state.present - {order[index]}
            }
            for index in stages
        ]
        since = max((told.since.get((number, index), self.state.step) for index in range(len(order))), default=0)
        return max((at for at in set.intersection(*steps) if at >= since), default=None)

    def _event(self, event: Event, **more: Any) -> None:
        self.note(event, more)
        self.state = broker.apply(self.state, event)

    def _follow(self, event: Event, before: State) -> None:
        if isinstance(event, Planned):
            self.again += before.phase == broker.COMPUTING
            self._plan()
        elif isinstance(event, Began):
            self._begin()
        elif isinstance(event, Committed):
            self._commit(event.step)

    # --- a plan ---

    @property
    def owners(self) -> list[str]:
        """Of stages, in their order."""
        assert self.state.plan is not None
        (pipeline,) = self.state.plan.pipelines
        return [self.state.providers[p].name for p in pipeline.order]

    def _cut(self) -> None:
        """As the plan says; a model that is cut so already stays as it is."""
        if self.state.plan is None:
            return
        (pipeline,) = self.state.plan.pipelines
        if self.cutting is None or self.cutting.cuts != pipeline.cuts:
            graph, chain = self.training.graph, self.training.chain
            self.cutting = Cutting(self.state.epoch, graph, chain, pipeline.cuts)
            self.cuttings[self.cutting.number] = self.cutting

    def _based(self) -> None:
        """A step begins by the model as it is cut now."""
        assert self.cutting is not None
        self.base = self.cutting
        self.cuttings = {self.cutting.number: self.cutting}

    def _plan(self) -> None:
        self._cut()
        if self.state.plan is None:
            return
        self.told = Told()
        order = self.owners
        self.keepers = self._keepers()
        for name in sorted({*self.state.present, *self.leaving}):
            index = order.index(name) if name in order else None
            self.told.plan.add(name)
            self._tell(name, "plan", body=self._stage(index, order), tensors=self._constants(index))

    def _keepers(self) -> dict[str, list[str]]:
        """Of each owner, who keep its copies: first those without a stage, as they are to take one over."""
        order = self.owners
        spares = sorted(self.state.present - set(order))
        found = {}
        for at, name in enumerate(order):
            turned = [*spares[at % max(1, len(spares)) :], *spares[: at % max(1, len(spares))]]
            others = [*turned, *order[at + 1 :], *order[:at]]
            found[name] = [each for each in others if each in self.state.present][: self.training.copies]
        return found

    def _stage(self, index: int | None, order: Sequence[str]) -> dict[str, Any]:
        assert self.cutting is not None
        common = {"cutting": self.cutting.number, "peers": list(order), "every": self.training.copy_every}
        if index is None:
            return {**common, "stage": None, "keepers": [], "rules": None}
        return {**common, **self._described(self.cutting, index), "keepers": self.keepers[order[index]]}

    def _described(self, cutting: Cutting, index: int) -> dict[str, Any]:
        return {
            "stage": cutting.stages[index].to_json(),
            "graph": cutting.parts[index].to_json(),
            "rules": dataclasses.asdict(self.training.rules),
            "count": len(cutting.stages),
        }

    def _constants(self, index: int | None, cutting: Cutting | None = None) -> Arrays:
        cutting = cutting or self.cutting
        assert cutting is not None
        keys = () if index is None else cutting.stages[index].constants
        return {key: self.training.tensors[key] for key in keys}

    # --- state, to where it is needed ---

    def _move(self) -> None:
        """Asks for what owners lack and somebody has, and has computed again what nobody has. As far as all who are
        there have said what they have."""
        told, cutting = self.told, self.cutting
        if cutting is None or (told.plan & {*self.state.present, *self.leaving}) - set(told.holds):
            return
        there = {name: frozenset(names) for name, names in told.holds.items()}
        everything = frozenset().union(*there.values())
        missing = set[str]()
        for index, name in enumerate(self.owners):
            wanted = cutting.names[index] - there.get(name, frozenset()) - told.asked.setdefault(name, set())
            if self.state.step == 0:
                self._initial(name, cutting, index)
                told.asked[name] |= wanted
                continue
            others = {each: names for each, names in there.items() if each != name}
            for source, names in sources(wanted, others).items():
                self._tell(source, "give", body={"names": names, "who": name})
                told.asked[name] |= set(names)
            missing |= wanted - everything
        if missing:
            self._revive(missing)

    def _initial(self, name: str, cutting: Cutting, index: int) -> None:
        """Before the first step the broker has it all."""
        own = [each for each in sorted(cutting.names[index]) if each.startswith((PARAMETER, VARIABLE))]
        if self.told.asked[name]:
            return
        tensors = {each: self.training.tensors[each[2:]] for each in own}
        self._tell(name, "state", body={"begin": True, "last": True}, tensors=tensors)

    def _revive(self, missing: Iterable[str]) -> None:
        """Has the stages computed again that have these names. JobLost where no copies of them are left."""
        base, told, until = self.base, self.told, self.state.step
        assert base is not None, "a step has been committed"
        wanted = [at for at in lost(base, missing) if at not in told.reviving]
        if not wanted:
            return
        every = sorted({*wanted, *told.reviving})
        kept = [
            {step: who & set(told.holds) for step, who in told.copies.get((base.number, at), {}).items()}
            for at in every
        ]
        common = set.intersection(*({step for step, who in each.items() if who} for each in kept))
        near = {other for at in every for other in self._neighbours(base, at)} - set(every)
        begun = max((told.since.get((base.number, other), until + 1) for other in near), default=0)
        if not any(step >= begun for step in common):
            raise JobLost(f"step {until}: stages {every} are lost, and nobody has what they are computed again from")
        after = max(common)
        who = {at: self._reviver(base, at) for at in every}
        for at, copies in zip(every, kept, strict=True):
            self._tell(
                who[at],
                "revive",
                body={
                    **self._described(base, at),
                    "cutting": base.number,
                    "after": after,
                    "until": until,
                    "updates": [[self.updates[s].rate, self.updates[s].scale] for s in range(after + 1, until + 1)],
                    "peers": {str(other): name for other, name in who.items()},
                },
                tensors=self._constants(at, base),
            )
            if who[at] not in copies[after]:
                copy = {"copy": [base.number, at], "who": who[at]}
                self._tell(min(copies[after]), "give", step=after, body=copy)
        told.reviving = who
        for at in every:
            for step in range(after + 1, until + 1):
                self._inputs(who[at], base, at, step)
            for other in self._neighbours(base, at) - set(every):
                body = {
                    "cutting": base.number,
                    "stage": other,
                    "for": at,
                    "who": who[at],
                    "after": after,
                    "until": until,
                }
                self._tell(told.stages[base.number, other], "resend", body=body)

    def _reviver(self, base: Cutting, at: int) -> str:
        """The owner that has most use for what a stage had."""
        assert self.cutting is not None
        order = self.owners
        best = max(range(len(order)), key=lambda index: len(self.cutting.names[index] & base.names[at]))  # type: ignore[union-attr]
        return order[best]

    def _neighbours(self, cutting: Cutting, at: int) -> set[int]:
        """Stages that send something to this one."""
        own = cutting.stages[at]
        shared = {other.index for other in cutting.stages if at in {t for to in other.tells.values() for t in to}}
        return {*own.receives.values(), *own.sends.values(), *own.hears.values()} | shared

    # --- a step ---

    def _begin(self) -> None:
        self._based()
        assert self.cutting is not None
        for name in sorted(self.leaving):
            self._tell(name, "stop")
        self.leaving.clear()
        self.told.squares.clear()
        order, step = self.owners, self.state.step + 1
        for index, name in enumerate(order):
            self._tell(name, "begin", step=step, body={"safe": self.safe})
            self._inputs(name, self.cutting, index, step)
        for name in sorted(self.state.present - set(order)):
            self._tell(name, "tidy", body={"safe": self.safe})

    def _inputs(self, name: str, cutting: Cutting, index: int, step: int) -> None:
        own = cutting.stages[index].inputs
        if not own:
            return
        for at, arrays in enumerate(self.training.data(step)):
            body = {"cutting": cutting.number, "stage": index}
            self._tell(name, INPUT, step=step, body=body, tensors={key: arrays[key] for key in own}, micro_batch=at)

    def _update(self, step: int) -> Update:
        """By the norm of all gradients, whoever has them."""
        told, clip = self.told, self.training.clip
        norm = math.sqrt(sum(told.squares[key] for key in sorted(told.squares)))
        scale = clip / norm if clip and norm > clip else 1.0
        return Update(rate=self.training.rate(step), scale=scale, losses=told.losses)

    def _commit(self, step: int) -> None:
        own = self.updates[step]
        for name in self.owners:
            self._tell(name, "commit", step=step, body={"rate": own.rate, "scale": own.scale})
            self.tasks[name] = self.tasks.get(name, 0) + 1

    def _tell(
        self,
        name: str,
        kind: str,
        *,
        step: int | None = None,
        body: Mapping[str, Any] | None = None,
        tensors: Arrays | None = None,
        micro_batch: int = 0,
    ) -> None:
        frame = Frame(
            kind=kind,
            epoch=self.state.epoch,
            step=self.state.step if step is None else step,
            micro_batch=micro_batch,
            sender=BROKER,
            to=name,
            body=body or {},
            tensors=tensors or {},
        )
        self.out.append((name, encode(frame)))
