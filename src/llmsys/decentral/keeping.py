"""Copies of state: what a provider keeps for others, and what it sends of its own to those who keep it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from llmsys.decentral.holdings import Held, Holdings, Place
from llmsys.decentral.planes import CONSTANT, Arrays, names_of
from llmsys.decentral.saying import Give
from llmsys.decentral.wire import BROKER, Frame


class Keeping:
    """Of what is `here`."""

    def __init__(self, here: Holdings, give: Give) -> None:
        self.here, self._give = here, give
        self.keepers: tuple[str, ...] = ()
        self.keeps: dict[Place, tuple[str, dict[str, int]]] = {}  # of which stages, from whom, and bytes by name
        self.due = 0  # the step after which they are sent
        self._cutting = 0
        self._copied: dict[str, tuple[Place, int]] = {}  # by keeper, what it has been sent last
        self._sent: dict[str, tuple[int, Place, int]] = {}  # the same, and in which epoch

    def plan(self, body: Mapping[str, Any]) -> None:
        """Of a new plan; whoever keeps on keeping has what it was sent."""
        self._cutting = int(body["cutting"])
        self.told(body)
        self._copied = {name: self._copied[name] for name in self.keepers if name in self._copied}

    def told(self, body: Mapping[str, Any]) -> None:
        """Who keeps its copies from now on, and whose it keeps."""
        self.keeps = {
            (self._cutting, int(at)): (str(owner), {str(name): int(count) for name, count in nbytes.items()})
            for at, (owner, nbytes) in body["keeps"].items()
        }
        self.keepers = tuple(str(each) for each in body["keepers"])

    def keep(self, frame: Frame) -> Place | None:
        """A piece of somebody's copy: of which stage, once it is whole. ValueError for what is not to be kept here."""
        body = frame.body
        place = (int(body["keep"][0]), int(body["keep"][1]))
        owner, nbytes = self.keeps.get(place, ("", {}))
        if owner != frame.sender:
            raise ValueError(f"a copy of stage {place}: is not {frame.sender}'s to give, or not for here")
        piece, of = int(body["piece"]), int(body["of"])
        whole = self.here.keep(place, frame.step, frame.tensors, nbytes, piece=piece, of=of)
        self.here.note(frame.tensors, nbytes)
        return place if whole else None

    def send_due(self, place: Place, own: Held, epoch: int) -> None:
        """To all of them after a step of which the broker has said so; to who has not had this stage yet, in any
        case."""
        due = [name for name in self.keepers if self._copied.get(name, (None,))[0] != place]
        if own.at == self.due:
            due = [name for name in self.keepers if self._copied.get(name) != (place, own.at)]
        self._send(place, own, epoch, due)

    def send(self, place: Place, own: Held, epoch: int) -> None:
        """To all of them, as the broker asks for it; who has had it in this epoch is not sent it again."""
        self._send(place, own, epoch, [n for n in self.keepers if self._sent.get(n) != (epoch, place, own.at)])

    def _send(self, place: Place, own: Held, epoch: int, keepers: Sequence[str]) -> None:
        if not keepers:
            return
        names = names_of(own.work.stage, own.work.rules)
        state = own.work.executor.state(each for each in names if not each.startswith(CONSTANT))
        for name in keepers:
            fixed: Arrays = {}
            if name != BROKER and self._copied.get(name, (None,))[0] != place:
                # so that it is warm if it has to take over; the broker has had them from the start
                fixed = {each: self.here.constants[each] for each in names if each.startswith(CONSTANT)}
            self._copied[name], self._sent[name] = (place, own.at), (epoch, place, own.at)
            self._give({**state, **fixed}, name, own.at, {"keep": list(place)})
