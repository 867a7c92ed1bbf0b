"""State that is given: what a provider gives of what it has, and from whom it takes what its stage lacks."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from llmsys.decentral.holdings import Held, Holdings, Place
from llmsys.decentral.planes import MOMENTS
from llmsys.decentral.wire import BROKER, Array, Frame


class Giving:
    """Of what is `here`. `givers`: of what its stage lacks, who is to give which names, beside the broker."""

    def __init__(self, here: Holdings) -> None:
        self.here = here
        self.givers: dict[str, set[str]] = {}

    def expect(self, frame: Frame) -> None:
        """Whom the broker has asked to give something."""
        self.givers.setdefault(str(frame.body["who"]), set()).update(map(str, frame.body["names"]))

    def asked(self, frame: Frame) -> tuple[Mapping[str, Array], dict[str, Any]]:
        """Of its state what is asked for, of a stage or of a copy that it keeps; and what is said beside it."""
        if "copy" not in frame.body:
            return self.here.found(frame.body["names"], frame.step), {}
        place = (int(frame.body["copy"][0]), int(frame.body["copy"][1]))
        return self.here.copies[place][frame.step], {"copy": list(place)}

    def take(self, frame: Frame, own: Held | None) -> None:
        """What is given to the stage that it has, at this step (else None). ValueError from whom nobody has asked for
        it, and where a stage is to begin with what has not come."""
        if frame.sender != BROKER and frame.sender not in self.givers:
            raise ValueError(f"state: {frame.sender} was not asked for it")
        if own is None:
            return
        state = frame.tensors
        if frame.sender != BROKER:
            state = {name: each for name, each in state.items() if name in self.givers[frame.sender]}
            self.givers[frame.sender] -= set(state)  # each is given once
        own.put(state)
        self.here.note(state, own.names)
        if frame.body.get("begin") and frame.sender == BROKER:
            if lacking := {name for name in own.lacks if not name.startswith(MOMENTS)}:  # a piece was lost
                raise ValueError(f"state {min(lacking)}: has not come")
            own.work.executor.begin()

    def fill(self, live: Place | None, step: int) -> None:
        """What the stage that it has lacks and is here already, in another stage or in a copy."""
        own = self.here.stages.get(live) if live else None
        if own is not None and own.at == step and own.lacks:
            own.put(self.here.there(own.lacks, step))
