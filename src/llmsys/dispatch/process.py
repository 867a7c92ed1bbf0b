"""Runs a job in fresh processes, one for each rank: nothing leaks from one run into the next, and nothing survives it.

All of them, with whatever they started, are killed when a deadline passes (`follow`), and at the end.
"""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from llmsys import job as jobs
from llmsys.dispatch import ending, memory_limit
from llmsys.dispatch.child import Child
from llmsys.dispatch.follow import Follower
from llmsys.dispatch.links import Links
from llmsys.dispatch.stop import Stop
from llmsys.job import Job, Record


def run(job: Job, progress: Callable[[dict[str, Any]], None], lock: int, stop: Stop | None = None) -> Record:
    """The job's record, always: the run's own, or one that says how its processes ended.

    `lock` is a file descriptor that the children inherit and keep open as long as they live. KeyboardInterrupt is
    passed on after they have ended; the record is then on disk. `stop`: of other threads than the main one.
    """
    attempt = jobs.previous_attempts(Path(job.out)) + 1
    start = time.monotonic()
    with _children(job, lock) as children, contextlib.closing(Links(job, children)) as links:
        follower = Follower(job, children, progress, links, start, stop)
        verdict = follower.follow()
    verdict = verdict or follower.cause()
    record = ending.write(job, attempt, verdict, time.monotonic() - start, overrule=follower.overrules)
    if said := memory_limit.ignored(job.config):
        record.notes[memory_limit.NOTE] = said
        record.write(Path(job.out))
    if verdict[0] == "interrupted":
        raise KeyboardInterrupt  # also where the run had just finished: the person wants no next run
    return record


@contextlib.contextmanager
def _children(job: Job, lock: int) -> Iterator[list[Child]]:
    """One child a rank; all are gone at the end."""
    children: list[Child] = []
    try:
        for rank in range(job.config["train"]["world"]):
            children.append(Child(job, rank, lock))
        yield children
    finally:
        for child in children:
            child.kill()
