"""The broker at work: its pure core (`broker`), given a job, a wire and a log of events.

Frames come and go, time is an argument, and nothing else is touched: whoever drives a `Coordinator` hands it what
providers say and lets it look at the clock. What the core decides is written to the log before anybody is told, so that
a broker that dies is rebuilt from it. What providers have, it is told by them with each new plan, and is not kept.
"""

from __future__ import annotations

import collections
from collections.abc import Callable, Iterable, Mapping
from typing import Any

from llmsys.decentral import broker
from llmsys.decentral.broker import State
from llmsys.decentral.checking import Checking
from llmsys.decentral.contributions import Accounts
from llmsys.decentral.events import Began, Committed, Event, Held, Joined, Judged, Planned, Prepared
from llmsys.decentral.fleet import Provider
from llmsys.decentral.hearing import Hearing
from llmsys.decentral.journal import Journal, Note
from llmsys.decentral.members import Members
from llmsys.decentral.planes import Arrays
from llmsys.decentral.reach import REACH, Directory, Reach
from llmsys.decentral.recovery import Recovery
from llmsys.decentral.restarts import Restarts
from llmsys.decentral.steps import Steps
from llmsys.decentral.training import Training, Update
from llmsys.decentral.whereabouts import owners
from llmsys.decentral.wire import BROKER, Array, Frame, encode


class Coordinator:
    """`note` is called with each event, and what goes with it; `noted` when `out` is about to be told: then it has to
    last. `now`, here and in what this is made of: seconds on the clock of the job, which begins at 0 and goes on from
    the last event where a broker was rebuilt."""

    def __init__(
        self,
        job: broker.Job,
        training: Training,
        note: Note = lambda event, more: None,
        noted: Callable[[], None] = lambda: None,
    ) -> None:
        self.training = training
        self.out: list[tuple[str, bytes]] = []
        self.journal = Journal(job, note, noted)
        self.members = Members(self.journal, self._tell)
        self.directory = Directory()
        self.hearing = Hearing(
            self.journal, self.members, self.directory, self._said, lambda name, data: self.out.append((name, data))
        )
        self.recovery = Recovery(training, self._tell)
        self.checks = Checking(self.recovery, self._tell)
        self.steps = Steps(self.journal, self.members, self.recovery, self.checks, self._tell)
        self.restarts = Restarts(self.journal, self.members, self.hearing, self.recovery, self._follow)
        self.updates = self.recovery.updates
        self.begun_s = 0.0  # on the clock of the job

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
            if isinstance(event, Judged):
                self.checks.rebuild(more)
            elif isinstance(event, Planned):
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
        self.hearing.task_s.pop(provider.name, None)  # of another life, or from before the line broke
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
            self.recovery.have(frame, self.state)
            self.checks.have(frame)
            self.recovery.move(self.state, self.members.leaving)
        elif frame.kind == "revived":
            self.recovery.revived(frame, self.state)
            self.recovery.move(self.state, self.members.leaving)
        elif frame.kind == "state" and "keep" in body:
            self.recovery.copies.keep(frame, self.state)
            self.checks.copied(frame)
        elif frame.kind == "state":
            self.recovery.collect(frame, self.state)
        elif frame.kind == "refused":
            self.restarts.refused = (name, str(body["why"])[:500])
            self.refusals.append(": ".join(self.restarts.refused))
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
            self.members.awaited = None
            self.journal.heard(self.state.present, now)
            self.steps.told_again()
            self.restarts.after_rebuilding(now)
        self.members.let_go(now)
        self._replaced(now)
        self.recovery.tell_due(self.state, self.members.leaving)
        self.recovery.handing.unfit |= self.checks.unfit(self.state)
        self._sent_away(now)
        if not self.finished:
            self.restarts.nothing_came(now)
        if found := self.checks.news():
            self.journal.event(Judged(at_s=now), **found)
        while not self.finished and (events := self.steps.decided(now)):
            for event in events:
                more = self.steps.update(event.step) if isinstance(event, Committed) else {}
                self.journal.event(event, **more)
                self._follow(event)

    def _sent_away(self, now: float) -> None:
        """Those who cannot run what is theirs: they are told why."""
        handing, most_s = self.recovery.handing, self.training.hung_s
        hang = [name for name, task_s in self.hearing.task_s.items() if task_s > most_s and name in self.state.present]
        handing.unfit |= dict.fromkeys(hang, f"it is at one thing for more than task.hung_s={most_s:g} s")
        unfit, handing.unfit = handing.unfit, {}
        for name, why in unfit.items():
            self.refusals.append(f"{name}: {why}")
            self.members.send_away(name, why, now)

    def _replaced(self, now: float) -> None:
        """Those who have gone and had no stage: others keep what they kept."""
        if self.restarts.replaced(now):
            self.recovery.copies.kept_by_others(self.state)
            self._introduce()

    def _follow(self, event: Event) -> None:
        if isinstance(event, Planned):
            self.recovery.plan(self.state, self.members.leaving)
            self._introduce()
        elif isinstance(event, Began):
            self.steps.begin(event.at_s)
        elif isinstance(event, Committed):
            self.restarts.step_done()
            self.steps.commit(event)

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
