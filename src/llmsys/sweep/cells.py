"""A cell of a sweep: a job, or a combination of settings that cannot be; and the records of what is not run."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from llmsys import identity, job
from llmsys.errors import Contradiction
from llmsys.job import Job, Record
from llmsys.profile import environment
from llmsys.sweep.settings import Config

Make = Callable[[Config], Job]
"""The job of a composed config. Contradiction where its settings cannot go together, ValueError for a mistake."""


@dataclass(frozen=True)
class Cell:
    """`config` as it was composed. `fault`: why it cannot be run; "" where it can."""

    config: Config
    job: Job
    fault: str = ""


def cell(config: Config, make: Make) -> Cell:
    """The cell of a config. ValueError for a mistake; a Contradiction becomes its `fault`."""
    try:
        return Cell(config, make(config))
    except Contradiction as error:
        resolved, device_name = job.resolved(config)
        identifier = identity.run_id(resolved, device_name=device_name, content={})
        out = Path(config["results"]).expanduser().resolve() / config["name"] / identifier
        return Cell(config, Job(config=resolved, run_id=identifier, out=str(out)), str(error))


def cells(configs: Sequence[Config], make: Make) -> list[Cell]:
    """Each run once, in order. ValueError for a mistake in any, or where no combination can be."""
    made: dict[str, Cell] = {}
    for config in configs:
        each = cell(config, make)
        made.setdefault(each.job.out, each)
    if made and all(each.fault for each in made.values()):
        raise ValueError(next(iter(made.values())).fault)
    return list(made.values())


def write(job: Job, status: str, reason: str, error: str) -> Record:
    """The record of a run that is not made, and why. One that says so already stays as it is; it counts no attempt.

    It replaces whatever record is there: the caller holds the run's lock, and has seen that no finished one is.
    """
    out = Path(job.out)
    before = job_record(out)
    if before and (before.status, before.reason, before.error) == (status, reason, error):
        return before
    record = dataclasses.replace(
        Record.begin(job),
        status=status,
        reason=reason,
        error=error,
        attempts=before.attempts if before else 0,
        env=environment.describe_here(job.config),
    )
    out.mkdir(parents=True, exist_ok=True)
    record.write(out)
    return record


def job_record(out: Path) -> Record | None:
    """The record in a run's folder, if there is one that can be read."""
    return job.read_or_set_aside(out)
