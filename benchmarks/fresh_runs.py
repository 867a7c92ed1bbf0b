"""Ordinary llmsys runs, several at a time, each `python -m llmsys <overrides>` in a process of its own.

A run that is finished is not made again, so a comparison of hundreds of runs can be stopped at any moment and goes on
where it was. Ctrl-C (or SIGTERM) stops the runs that are under way, whose records then say so, and ends.
"""

from __future__ import annotations

import contextlib
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from functools import cache
from pathlib import Path

from llmsys import compose, main, runner
from llmsys.job import FINAL, Job, Record

Words = tuple[str, ...]
"""What stands after `python -m llmsys`."""
FAILED = ("failed", "nan")
"""(status, reason) of a run whose loss was no number any more: a result here, and not an error."""


@cache
def job(words: Words) -> Job:
    """The job that a command line means. ValueError for what is wrong with it."""
    (made,) = main.make_jobs([compose.compose(words)])
    return made


def finished(words: Words) -> Record | None:
    """The record of a run that has ended, one that diverged included; None where it is yet to be made."""
    record = Record.read(Path(job(words).out))
    return record if record is not None and ended(record) else None


def ended(record: Record) -> bool:
    return record.status in FINAL or (record.status, record.reason) == FAILED


class Progress:
    """Says on standard error how it goes: `expected` runs are to come in all, `parallel` at a time."""

    def __init__(self, expected: int, parallel: int = 1) -> None:
        self.expected, self.parallel = expected, parallel
        self.made, self.seconds = 0, 0.0

    def say(self, words: Words, record: Record, seconds: float) -> None:
        self.made += 1
        self.seconds += seconds
        self.expected = max(self.expected, self.made)
        left = (self.expected - self.made) * self.seconds / self.made / self.parallel
        text = f"[{self.made}/{self.expected}] {job(words).label}: {record.status} in {seconds:.0f} s"
        print(f"{text}; about {left / 60:.0f} min left", file=sys.stderr, flush=True)


class Runs:
    """Makes runs, `parallel` at a time; `expected` are to come in all."""

    def __init__(self, parallel: int, expected: int = 0) -> None:
        self.parallel, self.progress = parallel, Progress(expected, parallel)
        self._processes: list[subprocess.Popen[bytes]] = []
        self._lock = threading.Lock()
        self._stopped = False

    def __call__(self, wanted: Sequence[Words]) -> None:
        """Makes those of `wanted` that are not finished; equal ones once. RuntimeError for the first that did not end
        as a result, after all others; KeyboardInterrupt after those under way have been stopped."""
        todo = list({job(words).out: words for words in wanted if finished(words) is None}.values())
        errors = []
        with stoppable(), ThreadPoolExecutor(self.parallel) as pool:
            futures = [pool.submit(self._make, words) for words in todo]
            try:
                for future in as_completed(futures):
                    if error := future.exception():
                        errors.append(error)
                        print(error, file=sys.stderr, flush=True)
                    else:
                        self.progress.say(*future.result())
            except KeyboardInterrupt:
                pool.shutdown(wait=False, cancel_futures=True)
                self._stop()
                raise
        if errors:
            raise errors[0]

    def _make(self, words: Words) -> tuple[Words, Record, float]:
        before = time.monotonic()
        with self._lock:
            if self._stopped:
                raise KeyboardInterrupt
            process = subprocess.Popen(
                [sys.executable, "-m", "llmsys", *words],
                stdin=subprocess.DEVNULL,
                stdout=subprocess.DEVNULL,
                stderr=subprocess.PIPE,
                start_new_session=True,  # a terminal's Ctrl-C is for us; we pass it on, once
            )
            self._processes.append(process)
        _, told = process.communicate()
        with self._lock:
            self._processes.remove(process)
        record = finished(words)
        if record is None:
            raise RuntimeError(f"{job(words).label}: {(told.decode().strip() or 'ended without a record')}")
        return words, record, time.monotonic() - before

    def _stop(self) -> None:
        """Asks the runs under way to stop; `__call__` waits until they have."""
        with self._lock:
            self._stopped = True
            alive = list(self._processes)
        for process in alive:
            with contextlib.suppress(ProcessLookupError):
                process.send_signal(signal.SIGTERM)


@contextlib.contextmanager
def stoppable() -> Iterator[None]:
    """SIGTERM is as Ctrl-C, and so is SIGINT where a shell has put us into the background, which ignores it."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = {number: signal.signal(number, _interrupt) for number in (signal.SIGTERM, signal.SIGINT)}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def inline(wanted: Sequence[Words]) -> None:
    """As `Runs`, one after another in this process: for tests and debuggers."""
    for words in wanted:
        if finished(words) is None:
            record = runner.run(job(words))
            if not ended(record):
                raise RuntimeError(f"{job(words).label}: {record.error}")


def nothing(wanted: Sequence[Words]) -> None:
    """Makes no run: what is there is all there is."""


Make = Callable[[Sequence[Words]], None]
"""Sees to it that runs are finished, as far as it can."""


def _interrupt(number: int, frame: object) -> None:
    raise KeyboardInterrupt
