"""A sink that cannot harm the run: it is called in a thread of its own, and is never waited for without a deadline.

Trackers block. W&B's client waits for its service process without a limit: where that is stopped, a machine swaps or a
network file system hangs, a call returns in an hour or never. So the run hands its rows over and goes on. It waits at
three places only, and not beyond a deadline: for the start, for a table (which comes before the first step, and is not
to be made while steps are timed) and for the end.
"""

from __future__ import annotations

import logging
import queue
import threading
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from llmsys.job import Record
    from llmsys.schema import Tracker
    from llmsys.track import Sink

BEHIND = 100_000
"""Rows that may wait for a sink; at some 200 bytes a row that is 20 MB."""
LET_GO_S = 5.0
"""How long a sink may take to let go of what it holds."""


class Mirror:
    """A sink of the run's rows, tables and end. After its first failure it is told no more, and the log says so."""

    def __init__(self, sink: Sink, config: Tracker) -> None:
        """Begins to start `sink`; `started` waits for it."""
        self.name = type(sink).__name__
        self.fault = ""
        self._sink, self._start_s, self._finish_s = sink, config.start_s, config.finish_s
        self._lock = threading.Lock()
        self._calls: queue.Queue[tuple[Callable[[], None], threading.Event] | None] = queue.Queue(BEHIND)
        self._thread = threading.Thread(target=self._work, name=f"mirror {self.name}", daemon=True)
        self._came_up = self._put(sink.start)
        self._thread.start()

    def started(self) -> None:
        """Waits until the sink has come up, or has failed to."""
        self._wait(self._came_up, self._start_s, "tracker.start_s", "did not come up")

    def table(self, name: str, columns: Sequence[str], rows: Sequence[Sequence[Any]]) -> None:
        """Hands a table over and waits until the sink has taken it."""
        done = self._put(lambda: self._sink.table(name, columns, rows))
        self._wait(done, self._start_s, "tracker.start_s", f"did not take the table {name}")

    def row(self, row: dict[str, Any]) -> None:
        """Hands a copy of `row` over."""
        kept = dict(row)
        self._put(lambda: self._sink.row(kept))

    def finish(self, record: Record) -> None:
        """Hands the run's end over; `closed` waits for it."""
        self._put(lambda: self._sink.finish(record))
        self._put(None)

    def closed(self) -> str:
        """Waits until the sink has taken everything, or has failed to. What is to be said of it; empty: nothing."""
        if not self.fault:
            self._thread.join(self._finish_s)
        if not self.fault and self._thread.is_alive():
            self._give_up(f"was not done {self._finish_s:g} s after the run's end (tracker.finish_s)")
        said = self.fault or self._sink.note
        return f"{self.name}: {said}" if said else ""

    def _put(self, call: Callable[[], None] | None) -> threading.Event:
        """An event that is set when the sink has taken `call`, or will not."""
        done = threading.Event()
        if self.fault and call:
            done.set()
            return done
        try:
            self._calls.put_nowait((call, done) if call else None)
        except queue.Full:
            self._give_up(f"is {BEHIND} rows behind")
            done.set()
        return done

    def _work(self) -> None:
        """Goes on to the end of the run after a failure, since somebody may wait for what was handed over since."""
        while (item := self._calls.get()) is not None:
            call, done = item
            try:
                if not self.fault:
                    call()
            # Whatever a tracker's client raises, the local record stands; W&B's raises SystemExit too.
            except (Exception, SystemExit) as error:  # noqa: BLE001
                self._fail(f"failed and is told no more: {type(error).__name__}: {error}")
                self._let_go()
            finally:
                done.set()

    def _wait(self, done: threading.Event, limit_s: float, key: str, what: str) -> None:
        if not done.wait(limit_s):
            self._give_up(f"{what} in {limit_s:g} s ({key})")

    def _give_up(self, why: str) -> None:
        self._fail(f"{why} and is told no more")
        self._let_go()

    def _fail(self, fault: str) -> None:
        """The first fault is the one that is told: letting go of a call that hangs makes it raise."""
        with self._lock:
            if self.fault:
                return
            self.fault = " ".join(fault.split())
        logging.getLogger("llmsys").warning("the tracker %s %s", self.name, self.fault)

    def _let_go(self) -> None:
        """In a thread, since this may hang where the sink does."""
        thread = threading.Thread(target=self._abandon, name=f"end of mirror {self.name}", daemon=True)
        thread.start()
        thread.join(LET_GO_S)

    def _abandon(self) -> None:
        try:
            self._sink.abandon()
        except (Exception, SystemExit) as error:  # noqa: BLE001  as above
            logging.getLogger("llmsys").warning("the tracker %s: %s: %s", self.name, type(error).__name__, error)
