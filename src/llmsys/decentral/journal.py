"""What has happened in a job: the broker's state, event by event, and what is counted of them."""

from __future__ import annotations

import collections
from collections.abc import Callable, Collection, Mapping
from typing import Any

from llmsys.decentral import broker
from llmsys.decentral.broker import State
from llmsys.decentral.contributions import Accounts
from llmsys.decentral.events import Beat, Event, Planned
from llmsys.decentral.traffic import Traffic

Note = Callable[[Event, Mapping[str, Any]], None]


class Journal:
    """`note` is called with each event, and what goes with it; `noted`, before anybody is told of what follows from
    them."""

    def __init__(self, job: broker.Job, note: Note, noted: Callable[[], None]) -> None:
        self.state = State(job=job)
        self.accounts, self.traffic = Accounts(job.chain, job.work), Traffic()
        self.happened: collections.Counter[str] = collections.Counter()  # events that are in the log, by their kind
        self.again = 0  # steps that were under way when a plan ended
        self.note, self.noted = note, noted

    def event(self, event: Event, **more: Any) -> None:
        if carried := self.traffic.taken(event, frozenset(self.state.places)):
            more["bytes"] = carried
        self.note(event, more)
        self.replay(event, more)

    def replay(self, event: Event, more: Mapping[str, Any]) -> None:
        """An event that has been noted."""
        self.again += isinstance(event, Planned) and self.state.phase == broker.COMPUTING
        self.happened[type(event).__name__] += 1
        self.accounts.note(event, more)
        self.state = broker.apply(self.state, event)

    def heard(self, names: Collection[str], now: float) -> None:
        """Signs of life, which are in no log."""
        self.state = broker.apply(self.state, Beat(at_s=now, names=frozenset(names)))
