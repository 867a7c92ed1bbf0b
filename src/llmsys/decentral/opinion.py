"""A provider's part in a check: it computes some steps of another's stage again, from a copy of its state, and says
what comes of them. Nobody is sent anything else."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

from llmsys.decentral.claims import hashed
from llmsys.decentral.holdings import Held, Holdings, Place
from llmsys.decentral.planes import CONSTANT, Arrays, names_of
from llmsys.decentral.stage_work import StageWork
from llmsys.decentral.wire import Frame


@dataclass(kw_only=True)
class Opinion:
    """A stage as it is after `held.at`, of the steps after `after` up to `until`. `updates` of each; `near`: who have
    its neighbours. `steps`: what came of those that are done."""

    held: Held
    after: int
    until: int
    updates: Mapping[int, tuple[float, float]]
    near: Mapping[int, str]
    results: dict[str, Any] = field(default_factory=dict)
    steps: list[dict[str, Any]] = field(default_factory=list)


class Opinions:
    """`made(frame)` is the work of the stage that a frame describes; `say(body)` tells the broker."""

    def __init__(
        self, here: Holdings, made: Callable[[Frame], StageWork], say: Callable[[Mapping[str, Any]], None]
    ) -> None:
        self.here, self._made, self._say = here, made, say
        self.open: dict[Place, Opinion] = {}

    def told(self, frame: Frame) -> None:
        """To begin one. What cannot be done here is said: it is no reason to go."""
        body = frame.body
        place, after = (int(body["cutting"]), int(body["stage"]["index"])), int(body["after"])
        updates = {after + 1 + at: (float(rate), float(scale)) for at, (rate, scale) in enumerate(body["updates"])}
        near = {int(stage): str(name) for stage, name in body["near"].items()}
        try:
            held = Held(work=self._made(frame), at=after, since=after)
            self.open[place] = Opinion(held=held, after=after, until=int(body["until"]), updates=updates, near=near)
            self.put(place, after, self.here.constants)
        except Exception as error:  # noqa: BLE001  its plane's framework may raise anything
            self._cannot(place, error)

    def put(self, place: Place, step: int, state: Arrays) -> None:
        """Of the state that one begins with, what it lacks."""
        if place in self.open and self.open[place].held.at == step:
            self.open[place].held.put(state)

    def work(self) -> bool:
        """The next task of any; whether there was one."""
        for place, each in [*self.open.items()]:
            try:
                if self._worked(place, each):
                    return True
            except Exception as error:  # noqa: BLE001  as above
                self._cannot(place, error)
        return False

    def _worked(self, place: Place, each: Opinion) -> bool:
        held, work = each.held, each.held.work
        if work.executor.missing or not held.settled():
            return False
        if held.at > each.after + len(each.steps):  # and all that belongs to the last step is here
            each.steps.append({**(work.claim(held.at) or {}), **each.results})
        if held.at == each.until:
            names = [name for name in names_of(work.stage, work.rules) if not name.startswith(CONSTANT)]
            self._done(place, {"steps": each.steps, "state": hashed(work.executor.state(names))})
            return True
        if work.step != held.at + 1:
            work.begin(held.at + 1)
        if work.work() is None:
            return False
        if work.computed:
            each.results = work.done().told()
            work.apply(*each.updates[work.step])
            held.applied()
        return True

    def _cannot(self, place: Place, error: Exception) -> None:
        self._done(place, {"why": f"{type(error).__name__}: {error}"[:500]})

    def _done(self, place: Place, body: Mapping[str, Any]) -> None:
        self.open.pop(place, None)
        self._say({"cutting": place[0], "stage": place[1], **body})
