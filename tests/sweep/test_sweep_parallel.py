"""Claims about several runs at once: as many as there is room for, and none is left when somebody wants no more."""

from __future__ import annotations

import os
import select
import signal
import threading
from collections.abc import Iterator

import pytest

from llmsys.dispatch.stop import Stop
from llmsys.sweep.parallel import Unit, together


class Work:
    """Units that yield their number once they are let go; `most`: how many were under way at once."""

    def __init__(self) -> None:
        self.running: set[int] = set()
        self.most = 0
        self.changed = threading.Condition()
        self.let_go: set[int] = set()
        self.stopped: list[int] = []

    def unit(self, number: int, room: int) -> Unit[int]:
        def run(stop: Stop) -> Iterator[int]:
            with self.changed:
                self.running.add(number)
                self.most = max(self.most, len(self.running))
                self.changed.notify_all()
            try:
                while number not in self.let_go:
                    if select.select([stop.once], [], [], 0.01)[0]:
                        self.stopped.append(number)
                        raise KeyboardInterrupt
                yield number
            finally:
                with self.changed:
                    self.running.discard(number)

        return Unit(run, lambda: room)

    def wait_for(self, *numbers: int) -> None:
        with self.changed:
            assert self.changed.wait_for(lambda: self.running >= set(numbers), 10)


def test_as_many_at_once_as_there_is_room_for_and_all_come() -> None:
    work = Work()
    work.let_go = set(range(9))
    assert sorted(together(iter([work.unit(number, 3) for number in range(9)]))) == list(range(9))
    assert 1 <= work.most <= 3


def test_a_unit_that_depends_on_what_runs_waits_for_it() -> None:
    work, seen = Work(), []
    work.let_go = {0, 1, 2}

    def units() -> Iterator[Unit[int] | None]:
        yield work.unit(0, 2)
        yield work.unit(1, 2)
        yield None
        seen.append(set(work.running))
        yield work.unit(2, 2)

    assert sorted(together(units())) == [0, 1, 2]
    assert seen == [set()], "nothing ran any more when the third was asked for"


def test_ctrl_c_stops_what_runs_and_starts_nothing_more() -> None:
    work = Work()
    threading.Thread(target=lambda: (work.wait_for(0, 1), os.kill(os.getpid(), signal.SIGUSR1)), daemon=True).start()

    def interrupt(number: int, frame: object) -> None:
        raise KeyboardInterrupt

    before = signal.signal(signal.SIGUSR1, interrupt)  # a shell's background jobs ignore SIGINT
    try:
        with pytest.raises(KeyboardInterrupt):
            list(together(iter([work.unit(number, 2) for number in range(4)])))
    finally:
        signal.signal(signal.SIGUSR1, before)
    assert sorted(work.stopped) == [0, 1]
    assert work.running == set()


def test_an_error_of_one_stops_the_others_and_is_raised() -> None:
    work = Work()

    def broken(stop: Stop) -> Iterator[int]:
        work.wait_for(0)
        raise ValueError("the second one's")
        yield

    with pytest.raises(ValueError, match="the second one's"):
        list(together(iter([work.unit(0, 2), Unit(broken, lambda: 2), work.unit(2, 2)])))
    assert work.stopped == [0]


def test_whoever_wants_no_more_leaves_nothing_running() -> None:
    work = Work()
    work.let_go = {0}
    made = together(iter([work.unit(0, 2), work.unit(1, 2)]))
    assert next(made) == 0
    made.close()
    assert work.running == set()
