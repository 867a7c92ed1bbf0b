"""The broker at work: its pure core (`broker`), given a job, a wire and a log of events.

Frames come and go, time is an argument, and nothing else is touched: whoever drives a `Coordinator` hands it what
providers say and lets it look at the clock. What the core decides is written to the log before anybody is told, so that
a broker that dies is rebuilt from it. What providers have, it is told by them with each new plan, and is not kept.
"""

from __future__ import annotations

import collections
import dataclasses
import math
from collections.abc import Callable, Iterable, Mapping
from typing import Any

from llmsys.decentral import broker
from llmsys.decentral.broker import State
from llmsys.decentral.checking import Checking
from llmsys.decentral.contributions import Accounts
from llmsys.decentral.events import Beat, Began, Committed, Event, Held, Joined, Left, Lost, Planned, Prepared
from llmsys.decentral.fleet import Provider
from llmsys.decentral.plan import Plan
from llmsys.decentral.planes import Arrays
from llmsys.decentral.provider import BEAT, BROKER
from llmsys.decentral.reach import BETWEEN, PROBE, PROBED, REACH, Directory, Reach
from llmsys.decentral.recovery import Recovery
from llmsys.decentral.traffic import Traffic
from llmsys.decentral.training import Training, Update
from llmsys.decentral.whereabouts import Stuck, owners
from llmsys.decentral.wire import Array, Frame, Malformed, decode, encode, header
from llmsys.errors import NotANumber

RELAYED = BETWEEN | {PROBE, PROBED}
Note = Callable[[Event, Mapping[str, Any]], None]
ASTRAY_S = 5.0
"""So long nothing comes, and nobody has anything to do."""
MOST_TRIES = 10
BACK_S = 10.0
"""How long a broker that was rebuilt waits for providers to dial again."""


class Coordinator:
    """`note` is called with each event, and what goes with it, before anybody is told."""

    def __init__(
        self,
        job: broker.Job,
        training: Training,
        note: Note = lambda event, more: None,
    ) -> None:
        self.training, self.note = training, note
        self.state = State(job=job)
        self.lives: dict[str, str] = {}
        self.connected: dict[str, Provider] = {}
        self.directory = Directory()
        self.asked: set[str] = set()  # to be let go
        self.leaving: dict[str, float] = {}  # without a stage, and still there to hand it over; heard of when
        self.recovery = Recovery(training, self._tell)
        self.checks = Checking(self.recovery, self._tell)
        self.updates = self.recovery.updates
        self.out: list[tuple[str, bytes]] = []
        self.counters = {"malformed": 0, "foreign": 0, "stale": 0, "refused": 0, "relayed": 0}
        self.refusals: collections.deque[str] = collections.deque(maxlen=10)
        self.accounts, self.traffic = Accounts(job.chain, job.work), Traffic()
        self.happened: collections.Counter[str] = collections.Counter()  # events that are in the log, by their kind
        self.again = 0  # steps that were under way when a plan ended
        self.begun_s = 0.0  # on the clock of the job
        self.moved_s = 0.0  # when anything but a sign of life was last heard
        self.astray = 0  # how often nothing came any more, and all began again
        self.tries = 0  # the same, of the step that comes next
        self.awaited: set[str] | None = None  # who is to dial again, of a broker that was rebuilt

    def rebuild(self, noted: Iterable[tuple[Event, Mapping[str, Any]]], now: float) -> None:
        """As the broker was that noted these, whose clock is now at `now`. Its providers are to dial again; those that
        do not are lost."""
        self.begun_s = self.moved_s = now
        for event, more in noted:
            if isinstance(event, Joined):
                self.lives[event.provider.name] = str(more["life"])
            if isinstance(event, Committed):
                own = {key: tuple(more[key]) for key in ("losses", "tokens")}
                self.updates[event.step] = Update(rate=more["rate"], scale=more["scale"], **own)
            self.happened[type(event).__name__] += 1
            self.accounts.note(event, more)
            before, self.state = self.state, broker.apply(self.state, event)
            if isinstance(event, Planned):
                self.again += before.phase == broker.COMPUTING
                self.recovery.cut(self.state)
            elif isinstance(event, Began):
                self.recovery.based()
        self.awaited = set(self.state.present)
        self.state = broker.apply(self.state, Beat(at_s=now + BACK_S, names=self.state.present))

    @property
    def finished(self) -> bool:
        """All steps are done, and what they have made of the model is here."""
        return self.state.step >= self.training.steps and self.recovery.gathered_all

    # --- what comes ---

    def join(self, provider: Provider, life: str, now: float, reach: Reach | None = None) -> None:
        """A provider that has come, has begun anew, or is back from before the broker was rebuilt. `reach`: where its
        peers do, if they may."""
        awaited = self.awaited or set()
        back = provider.name in awaited and self.lives[provider.name] == life
        awaited.discard(provider.name)
        self.leaving.pop(provider.name, None)
        self.asked.discard(provider.name)
        self.connected[provider.name] = provider
        self.directory.join(provider.name, reach)
        if not back:
            self.recovery.forgotten(provider.name)
            self.lives[provider.name] = life
            self._event(Joined(at_s=now, provider=provider), life=life)

    def gone(self, name: str, now: float) -> None:
        """Somebody's connection is closed, and will not come back."""
        self.connected.pop(name, None)
        self.asked.discard(name)
        if name in self.state.present:
            self._event(Lost(at_s=now, name=name))
        self.leaving.pop(name, None)

    def dismiss(self, name: str) -> None:
        """There is nothing left to do."""
        self._tell(name, "stop")

    def paused(self, now: float) -> None:
        """The broker itself was away for a while: whoever was there then has not been silent."""
        self.state = broker.apply(self.state, Beat(at_s=now, names=self.state.present - (self.awaited or set())))
        self.moved_s = now

    def beat(self, name: str, now: float, *, busy: bool = False) -> None:
        """A sign of life of somebody who has something to do, or has not."""
        self.moved_s = now if busy else self.moved_s
        if name in self.leaving:
            self.leaving[name] = now
        if name not in (self.awaited or ()):
            self.state = broker.apply(self.state, Beat(at_s=now, names=frozenset({name})))

    def hear(self, sender: str, data: bytes, now: float) -> None:
        """Bytes from a provider, which is known to be `sender`. One that was given up, since it was silent too long,
        and is not, begins as anybody who comes."""
        if sender in self.connected and sender not in self.state.present:
            self._event(Joined(at_s=now, provider=self.connected[sender]), life=self.lives[sender])
        self.beat(sender, now)
        try:
            head = header(data)
            if head["sender"] != sender:
                raise Malformed(f"a frame of {head['sender']}, from {sender}")
            if head["kind"] in RELAYED and head["to"] != BROKER:
                self.moved_s = now if head["kind"] in BETWEEN else self.moved_s
                self._relay(head, data)
                return
            frame = decode(data)
        except Malformed:
            self.counters["malformed"] += 1
            return
        if frame.kind == BEAT and frame.to == BROKER:
            self.beat(sender, now, busy=frame.body.get("busy") is True)
            if REACH in frame.body:
                self._guarded(frame, lambda: self.directory.hear(sender, frame.body[REACH], self.state.places))
            return
        if frame.to != BROKER or not self._of_this_job(head):
            self.counters["foreign"] += 1
            return
        self.moved_s = now
        if frame.kind == "leave":
            self.asked.add(sender)
        elif frame.epoch != self.state.epoch or self.state.plan is None:
            self.counters["stale"] += 1
        else:
            self._guarded(frame, lambda: self._taken(frame, head, len(data), now))

    def _taken(self, frame: Frame, head: Mapping[str, Any], nbytes: int, now: float) -> None:
        self._said(frame, now)
        if frame.tensors:
            self.traffic.passed(head, nbytes)

    def _guarded(self, frame: Frame, what: Callable[[], None]) -> None:
        """Whatever somebody says: what cannot be is counted."""
        try:
            what()
        except (ValueError, KeyError, TypeError, AttributeError, IndexError, ArithmeticError) as error:
            self.counters["refused"] += 1
            self.refusals.append(f"{frame.sender}: {frame.kind}: {type(error).__name__}: {error}")

    def _of_this_job(self, head: Mapping[str, Any]) -> bool:
        """Who has come from another job, and has not been told of this one, may still speak of that one. To go is said
        of no job."""
        return head["job"] == self.state.job.name or head["kind"] == "leave"

    def _relay(self, head: Mapping[str, Any], data: bytes) -> None:
        """Only in this epoch, and only to somebody who is there."""
        if not self._of_this_job(head):
            self.counters["foreign"] += 1
        elif head["epoch"] != self.state.epoch:
            self.counters["stale"] += 1
        elif head["to"] in self.state.present or head["to"] in self.leaving:
            self.counters["relayed"] += head["kind"] in BETWEEN
            self.traffic.passed(head, len(data))
            self.out.append((head["to"], data))

    def _said(self, frame: Frame, now: float) -> None:
        body, name = frame.body, frame.sender
        if frame.kind == "have":
            self.recovery.have(frame)
            self.checks.have(frame)
            self.recovery.move(self.state, self.leaving)
        elif frame.kind == "revived":
            self.recovery.revived(frame)
            self.recovery.move(self.state, self.leaving)
        elif frame.kind == "state" and "keep" in body:
            self.recovery.copies.keep(frame, self.state)
            self.checks.copied(frame)
        elif frame.kind == "state":
            self.recovery.collect(frame, self.state)
        elif frame.kind == "refused":
            self.refusals.append(f"{name}: {str(body['why'])[:500]}")
        elif frame.kind == "unable":
            self.recovery.handing.unfit[name] = str(body["why"])[:500]
        elif frame.kind == "copied":
            self.recovery.copies.copied(frame, self.state)
        elif frame.kind == "opinion":
            self.checks.opinion(frame)
        elif frame.kind == "held":
            self.recovery.held(frame, self.state)
            self.checks.held(frame, self.state)
            self._event(Held(at_s=now, names=frozenset({name}), epoch=frame.epoch, step=frame.step))
        elif frame.kind == "prepared":
            if (self.state.phase, frame.step) != (broker.COMPUTING, self.state.step + 1):
                raise ValueError(f"prepared: step {frame.step}: is not the one under way")
            self.recovery.prepared(frame, self.state)
            self.checks.prepared(frame, self.state)
            self._event(Prepared(at_s=now, names=frozenset({name}), epoch=frame.epoch, step=frame.step))
        else:
            raise ValueError(f"{frame.kind}: no such frame")

    # --- what follows ---

    def tick(self, now: float) -> None:
        """Everything that follows from what has come, and from the time."""
        if self.awaited is not None and not self._all_back(self.awaited, now):
            return
        if self.asked and self.state.plan is None:  # nobody has anything that others want
            for name in sorted(self.asked & self.state.present):
                self.dismiss(name)
                self.connected.pop(name, None)
                self._event(Left(at_s=now, name=name))
            self.asked.clear()
        if self.asked and self.state.phase == broker.HOLDING and self.state.done:  # a step under way is not given up
            for name in sorted(self.asked & self.state.present):
                self.leaving[name] = now
                self.connected.pop(name, None)
                self._event(Left(at_s=now, name=name))
            self.asked.clear()
        self._replaced(now)
        self.recovery.tell_due(self.state, self.leaving)
        self.recovery.handing.unfit |= self.checks.unfit(self.state)
        self._sent_away(now)
        self._nothing_came(now)
        while not self.finished and (events := self._decided(now)):
            for event in events:
                before = self.state
                if isinstance(event, Committed):
                    self.updates[event.step] = self._update(event.step)
                    self._event(event, **dataclasses.asdict(self.updates[event.step]))
                else:
                    self._event(event)
                self._follow(event, before)

    def _sent_away(self, now: float) -> None:
        """Those who cannot run what is theirs: they are told why."""
        handing = self.recovery.handing
        unfit, handing.unfit = handing.unfit, {}
        for name, why in unfit.items():
            self.refusals.append(f"{name}: {why}")
            self._tell(name, "stop", body={"why": why})
            self.connected.pop(name, None)
            self._event(Left(at_s=now, name=name))

    def _nothing_came(self, now: float) -> None:
        """Everybody is there, nobody has anything to do, and the step is not done: something has gone astray, a frame
        that was corrupted, say. All begin again, in a new epoch."""
        own, waits = self.state, self.recovery.told
        if own.plan is None or own.gone or self.finished or waits.due or waits.waiting:
            self.moved_s = now
        if now > self.moved_s + ASTRAY_S:
            self.moved_s, self.astray, self.tries = now, self.astray + 1, self.tries + 1
            if self.tries > MOST_TRIES:
                last = self.refusals[-1] if self.refusals else "nobody has refused anything"
                raise Stuck(f"step {own.step + 1}: begun again {MOST_TRIES} times, and nothing comes; {last}")
            assert own.plan is not None
            self._again(now, own.plan)

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
            if self.state.step and self.recovery.where.base is self.recovery.where.cutting:
                self._commit(self.state.step)  # for whoever had not been told when the broker died
            self._again(now, self.state.plan)
        return True

    def _again(self, now: float, plan: Plan) -> None:
        """The same plan, in a new epoch: all say anew what they have."""
        self.moved_s = now
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
        lost = set(self.recovery.told.holds) - there - set(self.leaving) - {BROKER}
        keeping = {name for names in self.recovery.copies.keepers.values() for name in names} - {BROKER}
        if plan is None or self.state.gone or not (lost or keeping - there):
            return
        for name in lost:
            del self.recovery.told.holds[name]
        if lost and self.state.phase == broker.HOLDING and not self.state.done:
            self._again(now, plan)
        else:
            self.recovery.copies.kept_by_others(self.state)
            self._introduce()

    def _decided(self, now: float) -> tuple[Event, ...]:
        found = broker.decide(self.state, now)
        if found and isinstance(found[0], Began):
            if self.state.step >= self.training.steps:
                if self.checks.over(self.state, now):
                    self.recovery.gather(self.state)
                return ()
            if not self.recovery.copies.guarded(self.state):
                return ()
        return found

    def _event(self, event: Event, **more: Any) -> None:
        if carried := self.traffic.taken(event, frozenset(self.state.places)):
            more["bytes"] = carried
        self.note(event, more)
        self.accounts.note(event, more)
        self.happened[type(event).__name__] += 1
        self.state = broker.apply(self.state, event)

    def _follow(self, event: Event, before: State) -> None:
        if isinstance(event, Planned):
            self.again += before.phase == broker.COMPUTING
            self.recovery.plan(self.state, self.leaving)
            self._introduce()
        elif isinstance(event, Began):
            self._begin(now=event.at_s)
        elif isinstance(event, Committed):
            self.tries = 0
            at_once = self._at_once()
            self._commit(event.step, at_once=at_once)
            if at_once:
                self._event(Held(at_s=event.at_s, names=self.state.owners, epoch=event.epoch, step=event.step))

    def _at_once(self) -> bool:
        """Whether owners hold the state after a commit as soon as they have heard of it: nobody waits for values of
        shared parameters that another has. What is said to each arrives in its order, so the next step may be begun
        with the same breath, a way there and back sooner. Not where somebody waits to be let go between two steps, or
        owners are to say what they have computed before anybody is asked to check it."""
        waited = self.asked or self.training.checks
        return not waited and not any(stage.shares for stage in self.recovery.where.now.stages)

    def _introduce(self) -> None:
        """Tells owners of stages where they reach those whom they have something to say to; others, that they have
        nothing to say."""
        if self.state.plan is None:
            return
        order, there = self.owners, self.state.present
        others = there & {*order, *(name for names in self.recovery.copies.keepers.values() for name in names)}
        for name in sorted(there):
            if (told := self.directory.of(name, others if name in order else ())) is not None:
                self._tell(name, REACH, body=told)

    @property
    def trained(self) -> dict[str, Array]:
        """Parameters and variables as they are after the last step, by key; once it is `finished`."""
        return {name[2:]: each for name, each in self.recovery.gathered.items()}

    @property
    def owners(self) -> list[str]:
        """Of stages, in their order."""
        return owners(self.state)

    # --- a step ---

    def _begin(self, now: float) -> None:
        own, copies = self.recovery, self.recovery.copies
        own.based()
        self.checks.step(self.state, now)
        safe = copies.begin(self.state)
        for name in sorted(self.leaving):
            self._tell(name, "stop")
        self.leaving.clear()
        own.told.squares.clear()
        order, step = self.owners, self.state.step + 1
        for index, name in enumerate(order):
            self._tell(name, "begin", step=step, body={"safe": safe})
            own.handing.inputs(name, own.where.now, index, step)
        for name in sorted(self.state.present - set(order)):
            self._tell(name, "tidy", body={"safe": safe})

    def _update(self, step: int) -> Update:
        """By the norm of all gradients, whoever has them."""
        told, clip = self.recovery.told, self.training.clip
        norm = math.sqrt(sum(told.squares[key] for key in sorted(told.squares)))
        losses = () if self.training.rules.streams else told.results
        if not all(map(math.isfinite, (norm, *losses))):
            raise NotANumber(f"step {step}: a loss or a gradient is NaN or infinite")
        scale = clip / norm if clip and norm > clip else 1.0
        results = {"tokens" if self.training.rules.streams else "losses": told.results}
        return Update(rate=self.training.rate(step), scale=scale, **results)

    def _commit(self, step: int, *, at_once: bool = False) -> None:
        """`at_once`: nobody has to say that it holds what comes of it."""
        own = self.updates[step]
        body = {"rate": own.rate, "scale": own.scale, "at_once": at_once}
        for name in self.owners:
            self._tell(name, "commit", step=step, body=body)

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
            job=self.state.job.name,
            epoch=self.state.epoch,
            step=self.state.step if step is None else step,
            micro_batch=micro_batch,
            sender=BROKER,
            to=name,
            body=body or {},
            tensors=tensors or {},
        )
        self.out.append((name, encode(frame)))
