"""Follows the ranks of a run, wherever they are, until all are done or a deadline passes.

Whoever follows blocks on the ranks' pipes until the next deadline. A run's record lies in its folder from its first
moment, as unfinished; when the ranks have ended and it still is, it is said in it how they ended.

When one rank ends badly, the others wait for it in a collective and fail in turn. So the first to end is the one whose
error is shown; but a rank that was killed says nothing, and is the cause whoever spoke first.
"""

from __future__ import annotations

import io
import math
import time
from collections.abc import Callable, Sequence
from multiprocessing import connection
from typing import Any, Protocol

from llmsys.dispatch.ending import Verdict
from llmsys.dispatch.links import Unshaped
from llmsys.dispatch.stop import Stop
from llmsys.job import Job

AFTERMATH_S = 3.0
"""How long the other ranks may go on when one has ended badly: they are still heard, then they are killed."""


class Rank(Protocol):
    """One rank of a run. `pipe`: readable when there is something to hear. `ended`: what it said of its own end:
    status, reason, error, and when (`at`, by a clock that all ranks of a machine share)."""

    rank: int
    pipe: io.FileIO
    ended: dict[str, Any] | None

    def hear(self) -> list[dict[str, Any]] | None:
        """The messages that have come; None when there will be no more. Blocks for one."""

    def tell(self, **message: Any) -> None:
        """One line to it; one that is gone cannot hear it."""

    def interrupt(self) -> None:
        """Asks it and what it started to stop, as Ctrl-C would."""

    def kill(self) -> None:
        """Ends it and all that it started."""

    def code(self) -> int:
        """Its exit code, when there is no more to hear."""

    def gone(self) -> bool:
        """Whether it has ended."""

    def verdict(self) -> Verdict:
        """How it ended, of one that did not say so itself."""


class Follower:
    """Of one run. `stop`: asks for it from another thread; a KeyboardInterrupt in this one does too."""

    def __init__(
        self,
        job: Job,
        ranks: Sequence[Rank],
        progress: Callable[[dict[str, Any]], None],
        links: Unshaped,
        start: float,
        stop: Stop | None = None,
    ) -> None:
        self.ranks, self.progress, self.links, self.stop = ranks, progress, links, stop or Stop()
        self.settings = job.config["dispatch"]
        self.deadline = start + self.settings["timeout_s"]
        self.interrupted = self.asked = False
        """By whomever; and by whoever waits for the run."""
        self.ends: list[Rank] = []
        """Ranks in the order in which they were found to have ended badly."""
        self.blamed: int | None = None

    def follow(self) -> Verdict | None:
        """None if every rank ended by itself, or one did badly (`cause` says how); else which deadline passed."""
        alive = {rank.pipe: rank for rank in self.ranks}
        heard = dict.fromkeys(self.ranks, time.monotonic())
        idle: dict[Rank, float] = {}
        self.links.begin()
        while alive:
            try:
                limits = [self.deadline, *(heard[each] + self.settings["heartbeat_s"] for each in alive.values())]
                asked = self.stop.again if self.interrupted else self.stop.once
                wait = max(min(limits) - time.monotonic(), 0)
                waited: list[Any] = [*alive, asked]
                ready: list[Any] = connection.wait(waited, wait)  # not select, which knows 1,024 files
                if asked in ready:
                    raise KeyboardInterrupt
                for pipe in ready:
                    rank = alive[pipe]
                    messages = rank.hear()
                    if messages is None:
                        del alive[pipe]
                        self._closed(rank)
                        continue
                    heard[rank] = time.monotonic()
                    for message in messages:
                        idle[rank] = message.get("idle_s", 0.0)
                        self._take(rank, message)
                verdict = self._late(ready, list(alive.values()), heard, idle)
                if verdict:
                    return verdict
            except KeyboardInterrupt:
                self.asked = True
                if self.interrupted:
                    raise
                self._interrupt()
        return ("interrupted", "signal", "stopped") if self.interrupted else None

    def _interrupt(self) -> None:
        """Asks all ranks to stop; they may take `dispatch.grace_s` for it."""
        self.interrupted = True
        for rank in self.ranks:
            rank.interrupt()
        self.deadline = min(self.deadline, time.monotonic() + self.settings["grace_s"])

    def _take(self, rank: Rank, message: dict[str, Any]) -> None:
        if "progress" in message:
            self.progress(message["progress"])
        if "isolated" in message:
            self.links.isolated(rank)
        if "store" in message:
            for other in self.ranks[1:]:
                other.tell(store=message["store"])
        if "ended" in message:
            rank.ended = message["ended"]
            status = message["ended"]["status"]
            if status == "interrupted" and not self.interrupted:  # by somebody else, and perhaps it alone
                self._interrupt()
            elif status not in ("ok", "interrupted"):
                self._bad(rank)

    def _closed(self, rank: Rank) -> None:
        if rank.ended is None or rank.code() != 0:
            self._bad(rank)

    def _bad(self, rank: Rank) -> None:
        if rank not in self.ends:
            self.ends.append(rank)
        if len(self.ranks) > 1:
            self.deadline = min(self.deadline, time.monotonic() + AFTERMATH_S)

    def _late(
        self, ready: list[Any], alive: list[Rank], heard: dict[Rank, float], idle: dict[Rank, float]
    ) -> Verdict | None:
        """Which deadline has passed, if one has. Silence is judged only when nothing is there to read: after a
        suspension the pipes are full, not silent."""
        now = time.monotonic()
        if self.links.fault:
            return "failed", "network", self.links.fault
        if not ready:
            for rank in alive:
                if (silent := now - heard[rank]) >= self.settings["heartbeat_s"]:
                    error = f"no sign of life for {silent:.1f} s (dispatch.heartbeat_s)"
                    return "hang", "no heartbeat", self._of(rank, error)
        if now >= self.deadline and alive:
            if self.ends and not self.interrupted:
                return self.cause()
            if self.interrupted:
                return "interrupted", "signal", f"stopped; not ended by itself in {self.settings['grace_s']:g} s"
            return "timeout", "deadline", f"not done after dispatch.timeout_s={self.settings['timeout_s']:g} s"
        for rank in alive:
            if idle.get(rank, 0.0) >= self.settings["stall_s"]:
                error = f"alive, but no step done for {idle[rank]:.0f} s (dispatch.stall_s)"
                return "hang", "no progress", self._of(rank, error)
        return None

    def cause(self) -> Verdict:
        """Of the ranks that ended badly, the one to blame: one that was killed, else the first to end."""
        if not self.ends:
            ended = self.ranks[0].ended
            assert ended is not None
            return ended["status"], ended["reason"], ended["error"]
        silent = [rank for rank in self.ends if rank.ended is None and rank.gone()]
        blamed = silent[0] if silent else min(self.ends, key=_when)
        self.blamed = blamed.rank
        if blamed.ended is not None:
            return blamed.ended["status"], blamed.ended["reason"], self._of(blamed, blamed.ended["error"])
        status, reason, error = blamed.verdict()
        return status, reason, self._of(blamed, error)

    @property
    def overrules(self) -> bool:
        """Whether the verdict counts also against rank 0's own word: another rank is to blame, and they do not all say
        the same; or the run was interrupted, and rank 0 failed only since another rank had stopped before it."""
        ended = self.ranks[0].ended
        victims = self.interrupted and ended is not None and ended["status"] not in ("ok", "interrupted")
        unanimous = len({(r.ended["status"], r.ended["reason"]) if r.ended else None for r in self.ranks}) == 1
        return (self.blamed not in (None, 0) and not unanimous) or victims

    def _of(self, rank: Rank, text: str) -> str:
        return f"rank {rank.rank}: {text}" if len(self.ranks) > 1 else text


def _when(rank: Rank) -> float:
    """When a rank ended; one that did not say so, last."""
    return float(rank.ended["at"]) if rank.ended else math.inf
