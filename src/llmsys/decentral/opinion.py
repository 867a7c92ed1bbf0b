"""A provider's part in a check: it computes some steps of another's stage again, from a copy of its state, and says
what comes of them. Nobody is sent anything else."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

from llmsys.decentral.claims import hashed
from llmsys.decentral.holdings import Holdings, Place
from llmsys.decentral.planes import CONSTANT, Arrays, names_of
from llmsys.decentral.planes.guarded import Failed, why
from llmsys.decentral.replay import Replay, Replays, place_of
from llmsys.decentral.stage_work import StageWork
from llmsys.decentral.wire import Frame


@dataclass(kw_only=True)
class Opinion(Replay):
    """`steps`: what came of those that are done; `results` of the last, of which something may not be here yet."""

    results: dict[str, Any] = field(default_factory=dict)
    steps: list[dict[str, Any]] = field(default_factory=list)

    def computed(self, work: StageWork) -> None:
        self.results = work.done().told()


class Opinions(Replays[Opinion]):
    """`say(body)` tells the broker."""

    def __init__(
        self, here: Holdings, made: Callable[[Frame], StageWork], say: Callable[[Mapping[str, Any]], None]
    ) -> None:
        super().__init__(here, made)
        self._say = say

    def told(self, frame: Frame) -> None:
        """To begin one. What cannot be done here is said: it is no reason to go."""
        place = place_of(frame.body)
        try:
            self.open[place] = Opinion.told(frame, self._made, self.here)
        except Exception as error:  # noqa: BLE001  its plane's framework may raise anything
            self._cannot(place, error)

    def put(self, place: Place, step: int, state: Arrays) -> None:
        try:
            super().put(place, step, state)
        except Failed as error:
            self._cannot(place, error)

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
        if each.ready and held.at > each.after + len(each.steps):  # and all that belongs to the last step is here
            each.steps.append({**(work.claim(held.at) or {}), **each.results})
        if len(each.steps) < each.until - each.after:
            return each.work(each.computed) is not None
        names = [name for name in names_of(work.stage, work.rules) if not name.startswith(CONSTANT)]
        self._done(place, {"steps": each.steps, "state": hashed(work.executor.state(names))})
        return True

    def _cannot(self, place: Place, error: Exception) -> None:
        self._done(place, {"why": why(error)})

    def _done(self, place: Place, body: Mapping[str, Any]) -> None:
        self.open.pop(place, None)
        self._say({"cutting": place[0], "stage": place[1], **body})
