"""A provider's part in computing a lost stage again: it begins with a copy, and ends where the stage had been."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping

from llmsys.decentral.holdings import Held, Holdings, Place
from llmsys.decentral.replay import Replay, Replays, named, place_of
from llmsys.decentral.stage_work import Sent, StageWork
from llmsys.decentral.wire import BROKER, Frame


class Revivals(Replays[Replay]):
    """`send(place, sent, peers)`."""

    def __init__(
        self,
        here: Holdings,
        made: Callable[[Frame], StageWork],
        send: Callable[[Place, Iterable[Sent], Mapping[int, str]], None],
    ) -> None:
        super().__init__(here, made)
        self._send = send
        self.givers: dict[Place, set[str]] = {}  # of the copies that they begin with, beside the broker

    def told(self, frame: Frame) -> None:
        """To begin one; what it was told before, or has done, it leaves alone."""
        body, place = frame.body, place_of(frame.body)
        after, until = int(body["after"]), int(body["until"])
        there, now = self.here.stages.get(place), self.open.get(place)
        self.givers[place] = {str(body["giver"]), *(self.givers.get(place, ()) if now is not None else ())}
        if now is not None and (now.after, now.until, now.peers) == (after, until, named(body, "peers")):
            return
        if there is not None and there.at == until and there.since <= after and not there.lacks:
            return
        self.open[place] = Replay.told(frame, self._made, self.here)
        self.put(place, after, self.here.copies.get(place, {}).get(after, {}))

    def given(self, place: Place, frame: Frame) -> None:
        """Of the copy that one begins with. ValueError from who was not asked for it."""
        if frame.sender != BROKER and frame.sender not in self.givers.get(place, ()):
            raise ValueError(f"a copy of stage {place}: {frame.sender} was not asked for it")
        self.put(place, frame.step, frame.tensors)

    def finished(self) -> tuple[Place, Held] | None:
        """One that has come to its end: its stage is here now as if it had always been."""
        for place, each in self.open.items():
            if each.held.at == each.until and each.ready:
                del self.open[place]
                self.here.stages[place] = each.held
                return place, each.held
        return None

    def work(self) -> StageWork | None:
        """The next task of any; of which, if there was one."""
        for place, each in [*self.open.items()]:
            if (sent := each.work()) is not None:
                self._send(place, sent, each.peers)
                return each.held.work
        return None
