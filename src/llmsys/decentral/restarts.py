"""When all begin again with the plan that they have, in a new epoch: they say anew what they hold, and what was on its
way is of the old one."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable

from llmsys.decentral import broker
from llmsys.decentral.broker import State
from llmsys.decentral.events import Event, Planned
from llmsys.decentral.hearing import Hearing
from llmsys.decentral.journal import Journal
from llmsys.decentral.members import Members
from llmsys.decentral.plan import Plan
from llmsys.decentral.recovery import Recovery
from llmsys.decentral.whereabouts import Stuck
from llmsys.decentral.wire import BROKER

ASTRAY_S = 5.0
"""So long nothing comes, and nobody has anything to do."""
MOST_TRIES, TRIES = 10, 3
"""Of a step; and with one who refuses what it is told, where the others hold the model without it."""


class Restarts:
    """Of `journal`'s job; `follow(event)` does what follows from a plan. `astray`: how often nothing came any more, and
    all began again; `tries`: the same, of the step that comes next; `refused`: who has refused something last, of that
    step, and what."""

    def __init__(
        self,
        journal: Journal,
        members: Members,
        hearing: Hearing,
        recovery: Recovery,
        follow: Callable[[Event], None],
    ) -> None:
        self.journal, self.members, self.hearing, self.recovery = journal, members, hearing, recovery
        self._follow = follow
        self.astray = self.tries = 0
        self.refused = ("", "")

    @property
    def state(self) -> State:
        return self.journal.state

    def step_done(self) -> None:
        """What was tried has come to its end."""
        self.tries, self.refused = 0, ("", "")

    def nothing_came(self, now: float) -> None:
        """Everybody is there, nobody has anything to do, and the step is not done: something has gone astray, a frame
        that was corrupted, say. `Stuck` where that does not help."""
        own, waits = self.state, self.recovery.told
        if own.plan is None or own.gone or waits.due or waits.waiting:
            self.hearing.moved_s = now
        if now <= self.hearing.moved_s + ASTRAY_S:
            return
        self.hearing.moved_s = now
        self.astray, self.tries = self.astray + 1, self.tries + 1
        if self.tries > MOST_TRIES:
            last = self.hearing.refusals[-1] if self.hearing.refusals else "nobody has refused anything"
            raise Stuck(f"step {own.step + 1}: begun again {MOST_TRIES} times, and nothing comes; {last}")
        assert own.plan is not None
        name, why = self.refused
        if self.tries % TRIES == 0 and broker.spared(own, name):  # what follows is a plan of the others
            self.members.send_away(name, f"step {own.step + 1}: begun again and again; refused: {why}", now)
        else:
            self._again(now, own.plan)

    def after_rebuilding(self, now: float) -> None:
        """All have dialled again whom a broker that was rebuilt has known. Where owners have not, there will be another
        plan."""
        if self.state.plan is not None and not self.state.gone:
            self._again(now, self.state.plan)

    def replaced(self, now: float) -> bool:
        """Those who have gone and had no stage. Where somebody waited for what they were to give, all begin again; else
        others are to keep what they kept: whether that is so."""
        plan, there = self.state.plan, self.state.present
        self.members.silent(now)
        lost = set(self.recovery.told.holds) - there - set(self.members.leaving) - {BROKER}
        keeping = {name for names in self.recovery.copies.keepers.values() for name in names} - {BROKER}
        if plan is None or self.state.gone or not (lost or keeping - there):
            return False
        for name in lost:
            del self.recovery.told.holds[name]
        if lost and self.state.phase == broker.HOLDING and not self.state.done:
            self._again(now, plan)
            return False
        return True

    def _again(self, now: float, plan: Plan) -> None:
        self.hearing.moved_s = now
        spares = tuple(p for p in plan.spares if p not in self.state.absent)
        same = dataclasses.replace(plan, spares=spares)
        event = Planned(at_s=now, epoch=self.state.epoch + 1, plan=same, how="none")
        self.journal.event(event)
        self._follow(event)
