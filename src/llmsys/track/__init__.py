"""Who is told of a run's metrics: a local file always, mirrors beside it."""

from __future__ import annotations

import logging
from collections.abc import Callable
from typing import TYPE_CHECKING, Any, Protocol

if TYPE_CHECKING:
    from llmsys.job import Job, Record
    from llmsys.schema import Tracker


class Sink(Protocol):
    """Takes rows of metrics while a run goes on, and its record at the end."""

    def row(self, row: dict[str, Any]) -> None: ...

    def finish(self, record: Record) -> None: ...


def mirrors(config: Tracker, job: Job) -> list[Sink]:
    """The sinks beside the local file. ValueError names the extra to install where a package is missing."""
    if config.kind == "none":
        return []
    from llmsys.track.wandb import WandB

    return [Mirror(WandB(config, job))]


class Mirror:
    """A sink that may fail without harm to the run: after its first failure it is left alone, and the log says so."""

    def __init__(self, sink: Sink) -> None:
        self._sink: Sink | None = sink

    def row(self, row: dict[str, Any]) -> None:
        self._try(lambda sink: sink.row(row))

    def finish(self, record: Record) -> None:
        self._try(lambda sink: sink.finish(record))

    def _try(self, call: Callable[[Sink], None]) -> None:
        if self._sink is None:
            return
        try:
            call(self._sink)
        except Exception as error:  # noqa: BLE001  whatever a tracker's client raises, the local record stands
            logging.getLogger("llmsys").warning("the tracker failed and is told no more: %s", error)
            self._sink = None
