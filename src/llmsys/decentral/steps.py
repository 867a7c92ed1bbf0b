"""A step in two phases, as it is spoken: all are told to begin it, and, when all have prepared it, to commit it.

Before the commit nobody has applied anything, and after it each update is certain, and is applied once, by its number
(`broker`).
"""

from __future__ import annotations

import dataclasses
from typing import Any

from llmsys.decentral import broker
from llmsys.decentral.broker import State
from llmsys.decentral.checking import Checking
from llmsys.decentral.events import Began, Committed, Event, Held
from llmsys.decentral.journal import Journal
from llmsys.decentral.members import Members
from llmsys.decentral.recovery import Recovery
from llmsys.decentral.saying import Tell
from llmsys.decentral.whereabouts import owners


class Steps:
    """Of `journal`'s job."""

    def __init__(self, journal: Journal, members: Members, recovery: Recovery, checks: Checking, tell: Tell) -> None:
        self.journal, self.members, self.recovery, self.checks = journal, members, recovery, checks
        self.training, self._tell = recovery.training, tell

    @property
    def state(self) -> State:
        return self.journal.state

    def decided(self, now: float) -> tuple[Event, ...]:
        """What the broker's core decides; but no step begins after the last one, nor while there is a stage that could
        not be computed again."""
        found = broker.decide(self.state, now)
        if found and isinstance(found[0], Began):
            if self.state.step >= self.training.steps:
                if self.checks.over(self.state, now):
                    self.recovery.gather(self.state)
                return ()
            if not self.recovery.copies.guarded(self.state):
                return ()
        return found

    def begin(self, now: float) -> None:
        """All are told to compute the next step, and what of it is theirs; and what is too old to be asked for."""
        own, copies = self.recovery, self.recovery.copies
        own.based()
        self.checks.step(self.state, now)
        safe, copy = copies.begin(self.state), copies.due(self.state)
        self.members.handed_over()
        own.told.squares.clear()
        order, step = owners(self.state), self.state.step + 1
        for index, name in enumerate(order):
            self._tell(name, "begin", step=step, body={"safe": safe, "copy": copy})
            own.handing.inputs(name, own.where.now, index, step)
        for name in sorted(self.state.present - set(order)):
            self._tell(name, "tidy", body={"safe": safe})

    def update(self, step: int) -> dict[str, Any]:
        """What all are to apply after a step that all have prepared, for the log. NotANumber where that is none."""
        told = self.recovery.told
        made = self.recovery.updates[step] = self.training.update(step, told.squares, told.results)
        return dataclasses.asdict(made)

    def commit(self, event: Committed) -> None:
        """All are told to apply it."""
        at_once = self._at_once()
        self._commit(event.step, at_once=at_once)
        if at_once:
            self.journal.event(Held(at_s=event.at_s, names=self.state.owners, epoch=event.epoch, step=event.step))

    def told_again(self) -> None:
        """The last commit, after a broker was rebuilt: whoever had not been told when it died may apply it still."""
        where = self.recovery.where
        if self.state.plan is not None and self.state.step and where.base is where.cutting:
            self._commit(self.state.step, at_once=False)

    def _commit(self, step: int, *, at_once: bool) -> None:
        """`at_once`: nobody has to say that it holds what comes of it."""
        own = self.recovery.updates[step]
        body = {"rate": own.rate, "scale": own.scale, "at_once": at_once}
        for name in owners(self.state):
            self._tell(name, "commit", step=step, body=body)

    def _at_once(self) -> bool:
        """Whether owners hold the state after a commit as soon as they have heard of it: nobody waits for values of
        shared parameters that another has. What is said to each arrives in its order, so the next step may be begun
        with the same breath, a way there and back sooner. Not where somebody waits to be let go between two steps, or
        owners are to say what they have computed before anybody is asked to check it."""
        waited = self.members.asked or self.training.checks
        return not waited and not any(stage.shares for stage in self.recovery.where.now.stages)
