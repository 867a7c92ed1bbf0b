"""The broker at work: its pure core (`broker`), given a job, a wire and a log of events.

Frames come and go, time is an argument, and nothing else is touched: whoever drives a `Coordinator` hands it what
providers say and lets it look at the clock. What the core decides is written to the log before anybody is told, so that
a broker that dies is rebuilt from it. What providers have, it is told by them with each new plan, and is not kept.
"""

from __future__ import annotations

import collections
import dataclasses
from collections.abc import Iterable, Mapping
from typing import Any

from llmsys.decentral import broker
from llmsys.decentral.broker import State
from llmsys.decentral.checking import Checking
from llmsys.decentral.contributions import Accounts
from llmsys.decentral.events import Began, Committed, Event, Held, Joined, Planned, Prepared
from llmsys.decentral.fleet import Provider
from llmsys.decentral.hearing import Hearing
from llmsys.decentral.journal import Journal, Note
from llmsys.decentral.members import Members
from llmsys.decentral.plan import Plan
from llmsys.decentral.planes import Arrays
from llmsys.decentral.reach import REACH, Directory, Reach
from llmsys.decentral.recovery import Recovery
from llmsys.decentral.training import Training, Update
from llmsys.decentral.whereabouts import Stuck, owners
from llmsys.decentral.wire import BROKER, Array, Frame, encode

ASTRAY_S = 5.0
"""So long nothing comes, and nobody has anything to do."""
MOST_TRIES = 10


class Coordinator:
    """`note` is called with each event, and what goes with it, before anybody is told."""

    def __init__(
        self,
        job: broker.Job,
        training: Training,
        note: Note = lambda event, more: None,
    ) -> None:
        self.training = training
        self.out: list[tuple[str, bytes]] = []
        self.journal = Journal(job, note)
        self.members = Members(self.journal, self._tell)
        self.directory = Directory()
        self.hearing = Hearing(
            self.journal, self.members, self.directory, self._said, lambda name, data: self.out.append((name, data))
        )
        self.recovery = Recovery(training, self._tell)
        self.checks = Checking(self.recovery, self._tell)
        self.updates = self.recovery.updates
        self.begun_s = 0.0  # on the clock of the job
        self.astray = 0  # how often nothing came any more, and all began again
        self.tries = 0  # the same, of the step that comes next

    def rebuild(self, noted: Iterable[tuple[Event, Mapping[str, Any]]], now: float) -> None:
        """As the broker was that noted these, whose clock is now at `now`. Its providers are to dial again; those that
        do not are lost."""
        self.begun_s = now
        self.moved(now)
        for event, more in noted:
            if isinstance(event, Joined):
                self.members.lives[event.provider.name] = str(more["life"])
            if isinstance(event, Committed):
                own = {key: tuple(more[key]) for key in ("losses", "tokens")}
                self.updates[event.step] = Update(rate=more["rate"], scale=more["scale"], **own)
            self.journal.replay(event, more)
            if isinstance(event, Planned):
                self.recovery.cut(self.state)
            elif isinstance(event, Began):
                self.recovery.based()
        self.members.rebuilt(now)

    # --- what others see ---

    @property
    def state(self) -> State:
        return self.journal.state

    @property
    def accounts(self) -> Accounts:
        return self.journal.accounts

    @property
    def happened(self) -> collections.Counter[str]:
        """Events, by their kind."""
        return self.journal.happened

    @property
    def again(self) -> int:
        """Steps that were under way when a plan ended."""
        return self.journal.again

    @property
    def counters(self) -> Mapping[str, int]:
        """Frames that were left alone, and relayed ones."""
        return self.hearing.counters

    @property
    def refusals(self) -> collections.deque[str]:
        return self.hearing.refusals

    @property
    def finished(self) -> bool:
        """All steps are done, and what they have made of the model is here."""
        return self.state.step >= self.training.steps and self.recovery.gathered_all

    @property
    def trained(self) -> dict[str, Array]:
        """Parameters and variables as they are after the last step, by key; once it is `finished`."""
        return {name[2:]: each for name, each in self.recovery.gathered.items()}

    @property
    def owners(self) -> list[str]:
        """Of stages, in their order."""
        return owners(self.state)

    # --- what comes ---

    def join(self, provider: Provider, life: str, now: float, reach: Reach | None = None) -> None:
        """A provider that has come, has begun anew, or is back from before the broker was rebuilt. `reach`: where its
        peers do, if they may."""
        self.directory.join(provider.name, reach)
        if self.members.join(provider, life, now):
            self.recovery.forgotten(provider.name)

    def gone(self, name: str, now: float) -> None:
        """Somebody's connection is closed, and will not come back."""
        self.members.gone(name, now)

    def dismiss(self, name: str) -> None:
        """There is nothing left to do."""
        self._tell(name, "stop")

    def moved(self, now: float) -> None:
        """Something is on its way, and nothing astray."""
        self.hearing.moved_s = now

    def paused(self, now: float) -> None:
        """The broker itself was away for a while: whoever was there then has not been silent."""
        self.members.paused(now)
        self.moved(now)

    def beat(self, name: str, now: float, *, busy: bool = False) -> None:
        """A sign of life of somebody who has something to do, or has not."""
        self.hearing.beat(name, now, busy=busy)

    def hear(self, sender: str, data: bytes, now: float) -> None:
        """Bytes from a provider, which is known to be `sender`."""
        self.hearing.hear(sender, data, now)

    def _said(self, frame: Frame, now: float) -> None:
        body, name = frame.body, frame.sender
        if frame.kind == "have":
            self.recovery.have(frame)
            self.checks.have(frame)
            self.recovery.move(self.state, self.members.leaving)
        elif frame.kind == "revived":
            self.recovery.revived(frame)
            self.recovery.move(self.state, self.members.leaving)
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
            self.journal.event(Held(at_s=now, names=frozenset({name}), epoch=frame.epoch, step=frame.step))
        elif frame.kind == "prepared":
            if (self.state.phase, frame.step) != (broker.COMPUTING, self.state.step + 1):
                raise ValueError(f"prepared: step {frame.step}: is not the one under way")
            self.recovery.prepared(frame, self.state)
            self.checks.prepared(frame, self.state)
            self.journal.event(Prepared(at_s=now, names=frozenset({name}), epoch=frame.epoch, step=frame.step))
        else:
            raise ValueError(f"{frame.kind}: no such frame")

    # --- what follows ---

    def tick(self, now: float) -> None:
        """Everything that follows from what has come, and from the time."""
        if self.members.awaited is not None:
            if not self.members.all_back(now):
                return
            self._goes_on(now)
        self.members.let_go(now)
        self._replaced(now)
        self.recovery.tell_due(self.state, self.members.leaving)
        self.recovery.handing.unfit |= self.checks.unfit(self.state)
        self._sent_away(now)
        self._nothing_came(now)
        while not self.finished and (events := self._decided(now)):
            for event in events:
                if isinstance(event, Committed):
                    told = self.recovery.told
                    self.updates[event.step] = self.training.update(event.step, told.squares, told.results)
                    self.journal.event(event, **dataclasses.asdict(self.updates[event.step]))
                else:
                    self.journal.event(event)
                self._follow(event)

    def _sent_away(self, now: float) -> None:
        """Those who cannot run what is theirs: they are told why."""
        handing = self.recovery.handing
        unfit, handing.unfit = handing.unfit, {}
        for name, why in unfit.items():
            self.refusals.append(f"{name}: {why}")
            self.members.send_away(name, why, now)

    def _nothing_came(self, now: float) -> None:
        """Everybody is there, nobody has anything to do, and the step is not done: something has gone astray, a frame
        that was corrupted, say. All begin again, in a new epoch."""
        own, waits = self.state, self.recovery.told
        if own.plan is None or own.gone or self.finished or waits.due or waits.waiting:
            self.moved(now)
        if now > self.hearing.moved_s + ASTRAY_S:
            self.moved(now)
            self.astray, self.tries = self.astray + 1, self.tries + 1
            if self.tries > MOST_TRIES:
                last = self.refusals[-1] if self.refusals else "nobody has refused anything"
                raise Stuck(f"step {own.step + 1}: begun again {MOST_TRIES} times, and nothing comes; {last}")
            assert own.plan is not None
            self._again(now, own.plan)

    def _goes_on(self, now: float) -> None:
        """All have dialled again whom a broker that was rebuilt has known: they begin in a new epoch."""
        self.members.awaited = None
        self.journal.heard(self.state.present, now)
        if self.state.plan is not None and not self.state.gone:
            if self.state.step and self.recovery.where.base is self.recovery.where.cutting:
                self._commit(self.state.step)  # for whoever had not been told when the broker died
            self._again(now, self.state.plan)

    def _again(self, now: float, plan: Plan) -> None:
        """The same plan, in a new epoch: all say anew what they have."""
        self.moved(now)
        spares = tuple(p for p in plan.spares if p not in self.state.absent)
        same = dataclasses.replace(plan, spares=spares)
        event = Planned(at_s=now, epoch=self.state.epoch + 1, plan=same, how="none")
        self.journal.event(event)
        self._follow(event)

    def _replaced(self, now: float) -> None:
        """Those who have gone and had no stage: others keep what they kept; and where somebody waited for what they
        were to give, all begin again, in a new epoch."""
        plan, there = self.state.plan, self.state.present
        self.members.silent(now)
        lost = set(self.recovery.told.holds) - there - set(self.members.leaving) - {BROKER}
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

    def _follow(self, event: Event) -> None:
        if isinstance(event, Planned):
            self.recovery.plan(self.state, self.members.leaving)
            self._introduce()
        elif isinstance(event, Began):
            self._begin(now=event.at_s)
        elif isinstance(event, Committed):
            self.tries = 0
            at_once = self._at_once()
            self._commit(event.step, at_once=at_once)
            if at_once:
                self.journal.event(Held(at_s=event.at_s, names=self.state.owners, epoch=event.epoch, step=event.step))

    def _at_once(self) -> bool:
        """Whether owners hold the state after a commit as soon as they have heard of it: nobody waits for values of
        shared parameters that another has. What is said to each arrives in its order, so the next step may be begun
        with the same breath, a way there and back sooner. Not where somebody waits to be let go between two steps, or
        owners are to say what they have computed before anybody is asked to check it."""
        waited = self.members.asked or self.training.checks
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

    # --- a step ---

    def _begin(self, now: float) -> None:
        own, copies = self.recovery, self.recovery.copies
        own.based()
        self.checks.step(self.state, now)
        safe = copies.begin(self.state)
        self.members.handed_over()
        own.told.squares.clear()
        order, step = self.owners, self.state.step + 1
        for index, name in enumerate(order):
            self._tell(name, "begin", step=step, body={"safe": safe})
            own.handing.inputs(name, own.where.now, index, step)
        for name in sorted(self.state.present - set(order)):
            self._tell(name, "tidy", body={"safe": safe})

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
