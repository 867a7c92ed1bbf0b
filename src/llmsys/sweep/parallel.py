"""Several runs of a sweep at once, each followed by a thread of its own; what comes of them is handed on by the one
that asked, in the order in which they end."""

from __future__ import annotations

import queue
import threading
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Generic, TypeVar

from llmsys.dispatch.stop import Stop

T = TypeVar("T")
LOOK_S = 1.0
"""Between two looks whether what is waited for can still come."""


@dataclass(frozen=True)
class Unit(Generic[T]):
    """`run` yields what comes of it, and raises KeyboardInterrupt when it was stopped; `room()`: how many like it may
    run at once."""

    run: Callable[[Stop], Iterator[T]]
    room: Callable[[], int]


def together(units: Iterator[Unit[T] | None]) -> Iterator[T]:
    """All of them; the next is asked for when there is room, None means that it depends on those that run.

    KeyboardInterrupt stops those that run, a second one at once; what they still yield is passed on before it is. An
    error of one of them stops the others likewise, and is raised."""
    stop, done = Stop(), queue.SimpleQueue[T | _Ended]()
    threads: set[threading.Thread] = set()
    fault: BaseException | None = None

    def work(unit: Unit[T]) -> None:
        error: BaseException | None = None
        try:
            for made in unit.run(stop):
                done.put(made)
        except BaseException as caught:  # noqa: BLE001  raised again by whoever waits
            error = caught
        finally:
            done.put(_Ended(threading.current_thread(), error))

    def start(unit: Unit[T]) -> None:
        thread = threading.Thread(target=work, args=(unit,), daemon=True)
        threads.add(thread)  # first: Ctrl-C may come right behind the start, and it would be waited for by nobody
        thread.start()

    try:
        waiting: list[Unit[T] | None] = []
        ended = False
        while True:
            try:
                while not (ended or stop.asked):
                    if not waiting:
                        following = next(units, _NONE)
                        if isinstance(following, _None):
                            ended = True
                            break
                        waiting.append(following)
                    unit = waiting[0]
                    if threads and (unit is None or len(threads) >= max(1, unit.room())):
                        break
                    waiting.pop()
                    if unit is not None:
                        start(unit)
                if not threads:
                    break
                made = done.get(timeout=LOOK_S)
            except queue.Empty:  # Ctrl-C may come between an item and its name, which is then gone
                threads -= {each for each in threads if not each.is_alive()} if done.empty() else set()
                continue
            except KeyboardInterrupt as error:
                fault = error
                stop.ask()
                continue
            if isinstance(made, _Ended):
                threads.discard(made.thread)
                if made.error is not None and not stop.asked:
                    fault = made.error
                    stop.ask()
                continue
            yield made
        if fault is not None:
            raise fault
    finally:
        if threads:  # whoever was handed something wants no more
            stop.ask()
        for thread in threads:
            if thread.ident is not None:  # Ctrl-C may have come before its start
                thread.join()


@dataclass(frozen=True)
class _Ended:
    thread: threading.Thread
    error: BaseException | None


class _None:
    """No unit is left."""


_NONE = _None()
