"""A stage's steps computed once more, by somebody who gets an older state of it and what its neighbours had sent since.

What comes of it is another's: a lost stage that is there again (`revival`), or what is said of it (`opinion`).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Generic, Self, TypeVar

from llmsys.decentral.holdings import Held, Holdings, Place
from llmsys.decentral.planes import Arrays
from llmsys.decentral.stage_work import Sent, StageWork
from llmsys.decentral.wire import Frame


@dataclass(kw_only=True)
class Replay:
    """A stage as it is after `held.at`, on its way from `after` to `until`. `updates` of each step. By stage: `peers`
    who compute others again, which it sends to; `near`: these, and who have its other neighbours."""

    held: Held
    after: int
    until: int
    updates: Mapping[int, tuple[float, float]]
    peers: Mapping[int, str]
    near: Mapping[int, str]

    @classmethod
    def told(cls, frame: Frame, made: Callable[[Frame], StageWork], here: Holdings) -> Self:
        """As a frame says; constants that are here are not sent again. What `made`, or the stage's plane, raises."""
        body, after = frame.body, int(frame.body["after"])
        updates = {after + 1 + at: (float(rate), float(scale)) for at, (rate, scale) in enumerate(body["updates"])}
        peers, near = named(body, "peers"), named(body, "near")
        held = Held(work=made(frame), at=after, since=after)
        held.put(here.constants)
        until = int(body["until"])
        return cls(held=held, after=after, until=until, updates=updates, peers=peers, near={**near, **peers})

    @property
    def ready(self) -> bool:
        """Whether all that belongs to its state is here."""
        return not self.held.work.executor.missing and self.held.settled()

    def work(self, computed: Callable[[StageWork], None] = lambda work: None) -> list[Sent] | None:
        """The next task, and after a step's last one its update: what goes out; None: there is nothing to do.
        `computed` is called between the two."""
        held, work = self.held, self.held.work
        if not self.ready or held.at == self.until:
            return None
        if work.step != held.at + 1:
            work.begin(held.at + 1)
        sent = work.work()
        if sent is not None and work.computed:
            computed(work)
            sent = [*sent, *work.apply(*self.updates[work.step])]
            held.applied()
        return sent


Kind = TypeVar("Kind", bound=Replay)


class Replays(Generic[Kind]):
    """Those that are not over (`open`), of a provider that has what is `here`. `made(frame)` is the work of the stage
    that a frame describes."""

    def __init__(self, here: Holdings, made: Callable[[Frame], StageWork]) -> None:
        self.here, self._made = here, made
        self.open: dict[Place, Kind] = {}

    def put(self, place: Place, step: int, state: Arrays) -> None:
        """Of the state that one begins with, what it lacks; what is of none, or too late for it, is left alone."""
        if place in self.open and self.open[place].held.at == step:
            held = self.open[place].held
            held.put(state)
            self.here.note(state, held.names)


def place_of(body: Mapping[str, Any]) -> Place:
    """Of the stage that a frame describes."""
    return int(body["cutting"]), int(body["stage"]["index"])


def named(body: Mapping[str, Any], key: str) -> dict[int, str]:
    """Providers, by stage; where a frame says nothing of them, none."""
    return {int(stage): str(name) for stage, name in body.get(key, {}).items()}
