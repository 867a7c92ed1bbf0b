"""Who has come to a job, who wants to go, and who is to come back to a broker that was rebuilt."""

from __future__ import annotations

from llmsys.decentral import broker
from llmsys.decentral.events import Joined, Left, Lost
from llmsys.decentral.fleet import Provider
from llmsys.decentral.journal import Journal
from llmsys.decentral.saying import Tell

BACK_S = 10.0
"""How long a broker that was rebuilt waits for providers to dial again."""


class Members:
    """Of `journal`'s job."""

    def __init__(self, journal: Journal, tell: Tell) -> None:
        self.journal, self._tell = journal, tell
        self.lives: dict[str, str] = {}
        self.connected: dict[str, Provider] = {}
        self.asked: set[str] = set()  # to be let go
        self.leaving: dict[str, float] = {}  # without a stage, and still there to hand it over; heard of when
        self.awaited: set[str] | None = None  # who is to dial again, of a broker that was rebuilt

    # --- who comes ---

    def join(self, provider: Provider, life: str, now: float) -> bool:
        """Whether it has come, or has begun anew; else it is back from before the broker was rebuilt."""
        name, awaited = provider.name, self.awaited or set()
        back = name in awaited and self.lives[name] == life
        awaited.discard(name)
        self.leaving.pop(name, None)
        self.asked.discard(name)
        self.connected[name] = provider
        if not back:
            self.lives[name] = life
            self.journal.event(Joined(at_s=now, provider=provider), life=life)
        return not back

    def beat(self, name: str, now: float) -> None:
        """A sign of life."""
        if name in self.leaving:
            self.leaving[name] = now
        if name not in (self.awaited or ()):
            self.journal.heard({name}, now)

    def heard(self, name: str, now: float) -> None:
        """A sign of life; one that was given up, since it was silent too long, and is not, begins as anybody who
        comes."""
        if name in self.connected and name not in self.journal.state.present:
            self.journal.event(Joined(at_s=now, provider=self.connected[name]), life=self.lives[name])
        self.beat(name, now)

    def paused(self, now: float) -> None:
        """The broker itself was away for a while: whoever was there then has not been silent."""
        self.journal.heard(self.journal.state.present - (self.awaited or set()), now)

    # --- who comes back ---

    def rebuilt(self, now: float) -> None:
        """Whoever was there is awaited."""
        self.awaited = set(self.journal.state.present)
        self.journal.heard(self.awaited, now + BACK_S)

    def all_back(self, now: float) -> bool:
        """Whether all are who were awaited, or are lost."""
        if self.awaited is None:
            return True
        for event in broker.decide(self.journal.state, now):
            if isinstance(event, Lost):
                self.journal.event(event)
        self.awaited &= self.journal.state.present
        return not self.awaited

    # --- who goes ---

    def gone(self, name: str, now: float) -> None:
        """Its connection is closed, and will not come back."""
        self.connected.pop(name, None)
        self.asked.discard(name)
        if name in self.journal.state.present:
            self.journal.event(Lost(at_s=now, name=name))
        self.leaving.pop(name, None)

    def let_go(self, now: float) -> None:
        """Those who have asked for it: before there is a plan, as nobody has anything that others want; later between
        two steps, as a step under way is not given up, and they stay until others have what they had."""
        state = self.journal.state
        if not self.asked or (state.plan is not None and not (state.phase == broker.HOLDING and state.done)):
            return
        for name in sorted(self.asked & state.present):
            if state.plan is None:
                self._tell(name, "stop")
            else:
                self.leaving[name] = now
            self.connected.pop(name, None)
            self.journal.event(Left(at_s=now, name=name))
        self.asked.clear()

    def send_away(self, name: str, why: str, now: float) -> None:
        """Somebody who cannot run what is its own: it is told why."""
        self._tell(name, "stop", body={"why": why})
        self.connected.pop(name, None)
        self.journal.event(Left(at_s=now, name=name))

    def handed_over(self) -> None:
        """A step begins: what those who leave had is with others."""
        for name in sorted(self.leaving):
            self._tell(name, "stop")
        self.leaving.clear()

    def silent(self, now: float) -> None:
        """Whoever leaves, and is heard of no more."""
        since = now - self.journal.state.job.patience_s
        self.leaving = {name: at_s for name, at_s in self.leaving.items() if at_s >= since}
