"""What a broker has decided, line by line in a file, from which it is rebuilt after its own death.

Only what counts is written: who came and went, plans, steps begun and committed. What providers hold they say
themselves, each time they are asked.
"""

from __future__ import annotations

import dataclasses
import json
import os
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from llmsys.decentral import events
from llmsys.decentral.events import Event
from llmsys.decentral.fleet import Provider
from llmsys.decentral.order import Pipeline
from llmsys.decentral.plan import Plan
from llmsys.decentral.score import Score

KEPT = (
    *(events.Joined, events.Left, events.Lost, events.Planned),
    *(events.Judged, events.Began, events.Committed),
)
EVENTS = "events.jsonl"
"""In the folder of a run."""
_KINDS = {kind.__name__: kind for kind in KEPT}


class EventLog:
    """Appends to the file at `path`; what was noted is on disk when `sync` returns. OSError where it cannot be
    written."""

    def __init__(self, path: Path) -> None:
        self.path = path
        path.parent.mkdir(parents=True, exist_ok=True)
        self._file = open(path, "a+b")  # noqa: SIM115  as long as the broker lives
        self._file.seek(0)
        self._file.truncate(self._file.read().rfind(b"\n") + 1)  # a line that was cut short was never acted upon
        self._synced = True

    def note(self, event: Event, more: Mapping[str, Any]) -> None:
        """`more`: what goes with it that is no part of the broker's state."""
        if isinstance(event, KEPT):
            data = {"event": type(event).__name__, **dataclasses.asdict(event), "more": more}
            self._file.write(json.dumps(data).encode() + b"\n")
            self._synced = False

    def sync(self) -> None:
        """All events that one thing has led to are written at once: a step that is committed, and the next one."""
        if not self._synced:
            self._file.flush()
            os.fsync(self._file.fileno())
            self._synced = True

    def close(self) -> None:
        self._file.close()


def last_step(noted: Iterable[tuple[Event, Mapping[str, Any]]]) -> int:
    """That was committed; 0: none."""
    return max((event.step for event, _ in noted if isinstance(event, events.Committed)), default=0)


def read(path: Path) -> list[tuple[Event, dict[str, Any]]]:
    """The events of a log, each with what went with it; [] where there is none. ValueError for a line that is none,
    with its number; the last one may be cut short."""
    if not path.exists():
        return []
    found = []
    *lines, _ = path.read_text(encoding="utf-8").split("\n")
    for number, line in enumerate(lines, 1):
        try:
            found.append(_event(json.loads(line)))
        except (ValueError, KeyError, TypeError) as error:
            raise ValueError(f"{path}:{number}: no event: {type(error).__name__}: {error}") from None
    return found


def _event(data: dict[str, Any]) -> tuple[Event, dict[str, Any]]:
    kind, more = _KINDS[data.pop("event")], data.pop("more")
    if kind is events.Joined:
        data["provider"] = Provider(**data["provider"])
    elif kind is events.Planned and data["plan"] is not None:
        data["plan"] = _plan(data["plan"])
    return kind(**data), more


def _plan(data: dict[str, Any]) -> Plan:
    pipelines = (Pipeline(tuple(order), tuple(cuts), seconds) for order, cuts, seconds in data["pipelines"])
    score = Score(**{**data["score"], "shares": tuple(data["score"]["shares"])})
    return Plan(**{**data, "pipelines": tuple(pipelines), "spares": tuple(data["spares"]), "score": score})
