"""Runs a job in this very process: for debuggers and tests."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from llmsys import runner
from llmsys.job import Job, Record


def run(job: Job, progress: Callable[[dict[str, Any]], None], lock: int) -> Record:
    """The job's record. `dispatch.memory_gib` is refused: a limit cannot be lifted again from a living process."""
    if job.config["dispatch"]["memory_gib"] is not None:
        raise ValueError("dispatch.memory_gib: needs dispatch=process")
    return runner.run(job, progress)
