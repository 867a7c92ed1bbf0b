"""Who is told of a run's metrics: a local file always, mirrors beside it."""

from __future__ import annotations

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

    return [WandB(config, job)]
