"""A provider's comings and goings: it leaves and pauses gracefully, by signals, and comes back.

SIGTERM, Ctrl-C    it does its part of the step under way, hands over what it has, and ends; twice, or where it has
                   nothing and nobody listens: it ends at once
SIGUSR1            the same, but it stays there, to come again at SIGUSR2: while its owner plays, say

So it does when its quota is used up. One that stays beyond a job waits for the next one, at the same address.
"""

from __future__ import annotations

import math
import threading
import uuid
from collections.abc import Callable
from typing import Any

from llmsys.decentral.link import LEAVE, Line, stay
from llmsys.decentral.provider import Provider


class _Nobody(Exception):
    """It goes, and there is nobody to whom it would hand anything over."""


class Presence:
    """`dial(life, busy)` opens a line; one that has ended is dialled again for `patience_s`, or, of one that is
    `staying`, until it is told to go. `why` as of `link.stay`."""

    def __init__(
        self,
        dial: Callable[[str, Callable[[], bool]], Line],
        patience_s: float,
        *,
        staying: bool = False,
        why: Callable[[str], None] = lambda text: None,
    ) -> None:
        self.dial, self.patience_s, self.staying, self.why = dial, patience_s, staying, why
        self._line: Line | None = None
        self._ending = self._paused = self._interrupted = False
        self._again = threading.Event()

    def run(self, made: Callable[[], Provider]) -> None:
        """Until it is let go, and neither paused nor staying. ValueError, which says why, where it is sent away; what
        `link.stay` raises."""
        while True:
            life, provider = uuid.uuid4().hex, made()
            self._again.clear()

            def dial(life: str = life, provider: Provider = provider) -> Line:
                if self._ending and provider.live is None:
                    raise _Nobody
                self._line = self.dial(life, lambda: provider.busy)
                if self._ending or self._paused:  # a broker that has died does not know it any more
                    self._say()
                return self._line

            try:
                stay(provider, dial, self._patience_s, self.why)
            except _Nobody:
                return
            self._line = None
            if provider.why:
                raise ValueError(provider.why)
            if self._ending or not (self._paused or self.staying):
                return
            while self._paused and not self._again.wait(1.0):  # so that signals are heard
                if self._ending:
                    return
            self._paused = False

    def _patience_s(self) -> float:
        return math.inf if self.staying and not self._ending else self.patience_s

    def leave(self) -> None:
        """As it says above; in any thread."""
        self._ending = True
        self._say()

    # --- signals; but for the first in any thread, too ---

    def interrupt(self, *signal: Any) -> None:
        if self._interrupted:
            raise KeyboardInterrupt
        self._interrupted = True
        self.leave()

    def pause(self, *signal: Any) -> None:
        self._again.clear()
        if not self._paused:
            self._paused = True
            self._say()

    def resume(self, *signal: Any) -> None:
        self._again.set()

    def _say(self) -> None:
        if (line := self._line) is not None:
            line.inbox.put(LEAVE)
