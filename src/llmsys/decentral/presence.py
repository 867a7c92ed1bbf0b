"""A provider's comings and goings: it leaves and pauses gracefully, by signals, and comes back.

SIGTERM, Ctrl-C    it does its part of the step under way, hands over what it has, and ends; twice: it ends at once
SIGUSR1            the same, but it stays there, to come again at SIGUSR2: while its owner plays, say
"""

from __future__ import annotations

import threading
import uuid
from collections.abc import Callable
from typing import Any

from llmsys.decentral.link import WAKE, Line, stay
from llmsys.decentral.provider import Provider


class Presence:
    """`dial(life, busy)` opens a line; one that has ended is dialled again for `patience_s`."""

    def __init__(self, dial: Callable[[str, Callable[[], bool]], Line], patience_s: float) -> None:
        self.dial, self.patience_s = dial, patience_s
        self._provider: Provider | None = None
        self._line: Line | None = None
        self._ending = self._paused = False
        self._again = threading.Event()

    def run(self, made: Callable[[], Provider]) -> None:
        """Until it is let go, and not merely paused. ValueError, which says why, where it is sent away; what
        `link.stay` raises."""
        while True:
            life, provider = uuid.uuid4().hex, made()
            self._provider = provider
            self._again.clear()

            def dial(life: str = life, provider: Provider = provider) -> Line:
                self._line = self.dial(life, lambda: provider.busy)
                if self._ending or self._paused:  # a broker that has died does not know it any more
                    self._say()
                return self._line

            stay(provider, dial, self.patience_s)
            self._provider = self._line = None
            if provider.why:
                raise ValueError(provider.why)
            if not self._paused or self._ending:
                return
            while not self._again.wait(1.0):  # so that signals are heard
                if self._ending:
                    return
            self._paused = False

    # --- signals, in the main thread ---

    def leave(self, *signal: Any) -> None:
        if self._ending or self._line is None:
            raise KeyboardInterrupt
        self._ending = True
        self._say()

    def pause(self, *signal: Any) -> None:
        if not self._paused:
            self._paused = True
            self._say()

    def resume(self, *signal: Any) -> None:
        self._again.set()

    def _say(self) -> None:
        if self._provider is not None and self._line is not None:
            self._provider.say_leave()
            self._line.inbox.put(WAKE)
