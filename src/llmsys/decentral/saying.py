"""How frames are said: by the broker, and by a provider of the job, the epoch and the step that it is at."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Protocol

from llmsys.decentral.holdings import chunks
from llmsys.decentral.wire import BROKER, Array, Frame


class Tell(Protocol):
    """Sends a frame of the broker's to `name`, of its job and epoch; `step` None: of the step that it is at."""

    def __call__(
        self,
        name: str,
        kind: str,
        *,
        step: int | None = None,
        body: Mapping[str, Any] | None = None,
        tensors: Mapping[str, Array] | None = None,
        micro_batch: int = 0,
    ) -> None: ...


class Give(Protocol):
    """Sends `state` to somebody, in pieces, each with `body`."""

    def __call__(self, state: Mapping[str, Array], to: str, step: int, body: Mapping[str, Any]) -> None: ...


class Saying:
    """By `name`. `out`: frames that are not on their way yet, in their order."""

    def __init__(self, name: str) -> None:
        self.name, self.job = name, ""
        self.epoch = self.step = 0
        self.out: list[Frame] = []

    def frame(
        self,
        kind: str,
        to: str,
        step: int,
        body: Mapping[str, Any],
        tensors: Mapping[str, Array],
        micro_batch: int = 0,
    ) -> Frame:
        """One of it, which is not said yet."""
        return Frame(
            kind=kind,
            job=self.job,
            epoch=self.epoch,
            step=step,
            micro_batch=micro_batch,
            sender=self.name,
            to=to,
            body=body,
            tensors=tensors,
        )

    def say(self, kind: str, *, step: int | None = None, body: Mapping[str, Any] | None = None) -> None:
        """To the broker."""
        self.out.append(self.frame(kind, BROKER, self.step if step is None else step, body or {}, {}))

    def give(self, state: Mapping[str, Array], to: str, step: int, body: Mapping[str, Any]) -> None:
        """State, in as many pieces as frames carry."""
        pieces = [*chunks(state)]
        for at, piece in enumerate(pieces):
            self.out.append(self.frame("state", to, step, {**body, "piece": at, "of": len(pieces)}, piece))
