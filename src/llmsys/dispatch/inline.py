"""Runs a job in this very process: for debuggers and tests."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from llmsys import runner
from llmsys.dispatch.stop import Stop
from llmsys.job import Job, Record


def run(job: Job, progress: Callable[[dict[str, Any]], None], lock: int, stop: Stop | None = None) -> Record:
    """The job's record."""
    return runner.run(job, progress)
