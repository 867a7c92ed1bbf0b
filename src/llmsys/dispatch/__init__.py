"""Where a job runs: `inline` in this process, `process` in a fresh one of its own, `ray` on nodes of a cluster,
`torchrun` as one of the ranks that it has started.

`submit` is the same for one run and for a sweep. A folder is locked while its run is made, so that two runs of one id
never meet: the second waits and then finds the first one's record.
"""

from __future__ import annotations

import contextlib
import fcntl
import functools
import os
from collections.abc import Callable, Iterator, Sequence
from multiprocessing import connection
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

from llmsys.dispatch import ending, inline, process, torchrun
from llmsys.dispatch.stop import Stop
from llmsys.job import FINAL, Job, Record, code_hash, previous_attempts, read_or_set_aside

if TYPE_CHECKING:
    from llmsys.dispatch.show import Show

Progress = Callable[[dict[str, Any]], None]
LOCKED_S = 0.5
"""Between two looks whether another process has let go of a run's folder."""


class Watch(Protocol):
    """Of the runs of a `submit`: hears of their progress, as a `Show` does, and may ask one to stop."""

    gave_up: bool
    """Whether it was this that stopped the run, so that nothing else is to be stopped."""

    def progress(self, values: dict[str, Any]) -> None: ...

    def judge(self, record: Record) -> Record:
        """The record as it is to be: the same, or that of a run that was given up."""


def _on_ray(job: Job, progress: Progress, lock: int, stop: Stop | None) -> Record:
    from llmsys.dispatch import ray

    return ray.run(job, progress, lock, stop)


_PLACES = {"inline": inline.run, "process": process.run, "ray": _on_ray, "torchrun": torchrun.run}


def submit(
    jobs: Sequence[Job],
    show: Show,
    first: int = 1,
    total: int | None = None,
    instead: Callable[[Job], Record | None] = lambda job: None,
    stop: Stop | None = None,
    watch: Watch | None = None,
) -> Iterator[Record]:
    """Runs `jobs` one after another and yields each record as it comes; a finished run's record is yielded as it is.

    For the person who watches, the jobs are the `first` of `total` and those after it (None: these are all).
    `instead(job)` is asked under the run's lock, where no finished run is there, just before it would be made: a record
    that is yielded in the run's place, or None. Asked any earlier, its answer could replace the record of a run that
    another process has made meanwhile.
    KeyboardInterrupt passes through after the running job has been stopped and its record written and yielded; `stop`
    is for where this is not the main thread; `watch` sees the runs that are made.
    """
    total = len(jobs) if total is None else total
    for number, job in enumerate(jobs, first):
        # of the ranks that torchrun has started one holds the lock for all
        with contextlib.nullcontext(-1) if torchrun.silent(job.config) else locked(job, show, stop) as lock:
            record = finished(job)
            if record is not None:
                show.reused(job, record, number, total)
                yield record
                continue
            record = instead(job)
            if record is not None:
                show.decided(job, record, number, total)
                yield record
                continue
            attempt = previous_attempts(Path(job.out)) + 1
            kind, stopped = job.config["dispatch"]["kind"], False
            try:
                show.start(job, number, total)
                record = _PLACES[kind](job, functools.partial(_seen, job, show, watch), lock, stop)
            except KeyboardInterrupt:
                stopped = True
                attempt = max(attempt, previous_attempts(Path(job.out)))  # it may have been begun again
                record = ending.write(job, attempt, ("interrupted", "signal", "stopped at once"), 0.0)
            finally:
                show.stop(job)
            record = watch.judge(record) if watch else record
            show.end(job, record, number, total)
            yield record
        # a node that is taken away interrupts its run, and no other
        given_up = watch is not None and watch.gave_up
        if not given_up and (stopped or (record.status == "interrupted" and kind != "ray")):
            raise KeyboardInterrupt


def _wait_for(lock: int, stop: Stop | None) -> None:
    """KeyboardInterrupt where somebody wants to stop: in a thread no signal ends a blocking call."""
    while True:
        if stop is None:
            fcntl.flock(lock, fcntl.LOCK_EX)
            return
        with contextlib.suppress(BlockingIOError):
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            return
        if connection.wait([stop.once], LOCKED_S):
            raise KeyboardInterrupt


def _seen(job: Job, show: Show, watch: Watch | None, values: dict[str, Any]) -> None:
    show.progress(job, values)
    if watch:
        watch.progress(values)


def finished(job: Job) -> Record | None:
    """The final record this job already left, if `reuse` allows to take it: none is, of other code, by default. One
    that is `doubtful` is not final."""
    reuse = job.config["reuse"]
    if reuse == "never":
        return None
    record = read_or_set_aside(Path(job.out))
    if record is None or record.status not in FINAL or record.doubtful:
        return None
    return record if reuse == "any" or record.code_hash == code_hash() else None


@contextlib.contextmanager
def locked(job: Job, show: Show, stop: Stop | None = None) -> Iterator[int]:
    """Holds the lock on the run's folder. The file descriptor is handed to the run's process: the lock lasts as long
    as either lives, so an orphan of a killed parent still keeps others out."""
    out = Path(job.out)
    try:
        out.mkdir(parents=True, exist_ok=True)
        lock = os.open(out / ".lock", os.O_RDWR | os.O_CREAT, 0o644)
    except OSError as error:
        raise ValueError(f"results={job.config['results']}: cannot be written: {error.strerror} ({out})") from error
    try:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            show.waiting(job)
            _wait_for(lock, stop)
        yield lock
    finally:
        os.close(lock)
