"""Who is told of a run's metrics: a local file always (`jsonl`), mirrors beside it.

A mirror is a `Sink` in a thread of its own (`Mirror`), which may fail, block, or never come up: the run goes on, and
its log and its record say so.
"""

from __future__ import annotations

import importlib
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, Protocol

from llmsys.track.mirror import Mirror

if TYPE_CHECKING:
    from llmsys.job import Job, Record
    from llmsys.schema import Tracker

__all__ = ["SINKS", "Mirror", "Sink", "check", "close", "mirrors"]

SINKS = {"wandb": "llmsys.track.wandb:WandB", "tensorboard": "llmsys.track.tensorboard:TensorBoard"}
"""A tracker's name -> module:class, imported when it is asked for. The class is called with a `Tracker`, a `Job` and
the run's environment; its `check()` raises what is a user's mistake, without loading the tracker."""


class Sink(Protocol):
    """Takes rows and tables while a run goes on, and its record at the end. All calls but `abandon` come from one
    thread, in this order; any may raise, or block."""

    note: str
    """What the record has to say of this mirror although it works; empty where there is nothing."""

    def start(self) -> None:
        """Comes up; nothing outside of this process is touched before."""

    def table(self, name: str, columns: Sequence[str], rows: Sequence[Sequence[Any]]) -> None:
        """A small table, whole, under a name of its own. Cells are strings and numbers."""

    def row(self, row: dict[str, Any]) -> None:
        """The metrics of a `step`. None stands for what is not finite."""

    def finish(self, record: Record) -> None:
        """The run has ended with `record`; afterwards nothing of the mirror is left but its files."""

    def abandon(self) -> None:
        """Lets go of whatever would outlive the run, from any thread, in any state: a call has failed, or blocks."""


def check(config: Tracker) -> None:
    """MissingPackage names the extra to install where a package is missing; ValueError for a variable of the
    environment that cannot be."""
    for sink in _chosen(config):
        sink.check()


def mirrors(config: Tracker, job: Job, env: dict[str, Any]) -> list[Mirror]:
    """The mirrors that the config asks for, once each has come up or has failed to. `env`: what the run is on, as its
    record has it. Raises what `check` does."""
    check(config)
    made = [Mirror(sink(config, job, env), config) for sink in _chosen(config)]
    for mirror in made:
        mirror.started()
    return made


def close(mirrors: Sequence[Mirror], record: Record) -> dict[str, str]:
    """Tells all the run's end, and waits for each until its time is over. What the record's notes have to say."""
    for mirror in mirrors:
        mirror.finish(record)
    said = [note for mirror in mirrors if (note := mirror.closed())]
    return {"tracker": "; ".join(said)} if said else {}


def _chosen(config: Tracker) -> list[Any]:
    kinds = {"none": [], "both": list(SINKS)}.get(config.kind, [config.kind])
    places = [SINKS[kind].split(":") for kind in kinds]
    return [getattr(importlib.import_module(module), name) for module, name in places]
