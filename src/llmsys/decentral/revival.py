"""A provider's part in computing a lost stage again: it begins with a copy, and ends where the stage had been."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass

from llmsys.decentral.holdings import Held, Holdings, Place
from llmsys.decentral.stage_work import Sent, StageWork
from llmsys.decentral.wire import Frame


@dataclass(kw_only=True)
class Revival:
    """A stage as it is after `held.at`, on its way to `until`. `updates` of each step; `peers` who compute others again
    that it sends to, by stage; `near`: who have its other neighbours."""

    held: Held
    until: int
    updates: Mapping[int, tuple[float, float]]
    peers: Mapping[int, str]
    near: Mapping[int, str]


class Revivals:
    """`made(frame)` is the work of the stage that a frame describes; `send(place, sent, peers)`."""

    def __init__(
        self,
        here: Holdings,
        made: Callable[[Frame], StageWork],
        send: Callable[[Place, Iterable[Sent], Mapping[int, str]], None],
    ) -> None:
        self.here, self._made, self._send = here, made, send
        self.open: dict[Place, Revival] = {}

    def told(self, frame: Frame) -> None:
        """To begin one; what it was told before, or has done, it leaves alone."""
        body = frame.body
        place = (int(body["cutting"]), int(body["stage"]["index"]))
        after, until = int(body["after"]), int(body["until"])
        peers, near = ({int(stage): str(name) for stage, name in body[key].items()} for key in ("peers", "near"))
        there, now = self.here.stages.get(place), self.open.get(place)
        if now is not None and (now.held.since, now.until, now.peers) == (after, until, peers):
            return
        if there is not None and there.at == until and there.since <= after and not there.lacks:
            return
        updates = {after + 1 + at: (float(rate), float(scale)) for at, (rate, scale) in enumerate(body["updates"])}
        held = Held(work=self._made(frame), at=after, since=after)
        self.open[place] = Revival(held=held, until=until, updates=updates, peers=peers, near=near)
        if after in self.here.copies.get(place, {}):
            held.work.executor.put(self.here.copies[place][after])

    def put(self, place: Place, step: int, frame: Frame) -> None:
        """Of a copy that one begins with."""
        if self.open[place].held.at == step:
            self.open[place].held.work.executor.put(frame.tensors)

    def finished(self) -> tuple[Place, Held] | None:
        """One that has come to its end: its stage is here now as if it had always been."""
        for place, each in self.open.items():
            if each.held.at == each.until and _ready(each):
                del self.open[place]
                self.here.stages[place] = each.held
                return place, each.held
        return None

    def work(self) -> StageWork | None:
        """The next task of any; of which, if there was one."""
        ready = ((place, each) for place, each in [*self.open.items()] if _ready(each))
        return next((each.held.work for place, each in ready if self._worked(place, each)), None)

    def _worked(self, place: Place, revival: Revival) -> bool:
        held, work = revival.held, revival.held.work
        if held.at == revival.until:
            return False
        if work.step != held.at + 1:
            work.begin(held.at + 1)
        sent = work.work()
        if sent is None:
            return False
        self._send(place, sent, revival.peers)
        if work.computed:
            self._send(place, work.apply(*revival.updates[work.step]), revival.peers)
            held.applied()
        return True


def _ready(revival: Revival) -> bool:
    return not revival.held.work.executor.missing and revival.held.settled()
