"""Ctrl-C, passed on to threads: a signal is heard by the main thread alone, and others wait on pipes."""

from __future__ import annotations

import contextlib
import os
import threading
import weakref


class Stop:
    """`once` is readable from the first time on that it is asked for, `again` from the second time."""

    def __init__(self) -> None:
        self.once, self._once = os.pipe()
        self.again, self._again = os.pipe()
        self._open = [self._once, self._again]
        self._children: weakref.WeakSet[Stop] = weakref.WeakSet()
        self._lock = threading.RLock()

    @property
    def asked(self) -> bool:
        return len(self._open) < 2

    def ask(self) -> None:
        """The first time: stop between two steps; the second time: at once."""
        with self._lock:
            if self._open:
                os.close(self._open.pop(0))  # whoever waits for something to read now reads the end
            for child in list(self._children):
                child.ask()

    def child(self) -> Stop:
        """One that is asked with this one, and can be asked alone."""
        made = Stop()
        with self._lock:
            for _ in range(2 - len(self._open)):
                made.ask()
            self._children.add(made)
        return made

    def __del__(self) -> None:
        for descriptor in (self.once, self.again, *self._open):
            with contextlib.suppress(OSError):
                os.close(descriptor)
