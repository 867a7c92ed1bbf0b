"""Runs a job in fresh processes, one for each rank: nothing leaks from one run into the next, and nothing survives it.

The parent blocks on the ranks' pipes until the next deadline, and kills all of them, with whatever they started, when
one passes. A run's record lies in its folder from its first moment, as unfinished; when the ranks have ended and it
still is, the parent writes into it how they ended.

When one rank ends badly, the others wait for it in a collective and fail in turn. So the first to end is the one whose
error is shown; but a rank that was killed says nothing, and is the cause whoever spoke first.
"""

from __future__ import annotations

import contextlib
import math
import select
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from llmsys import job as jobs
from llmsys.dispatch import ending, memory_limit
from llmsys.dispatch.child import Child
from llmsys.dispatch.ending import Verdict
from llmsys.dispatch.links import Links
from llmsys.job import Job, Record

AFTERMATH_S = 3.0
"""How long the other ranks may go on when one has ended badly: they are still heard, then they are killed."""


def run(job: Job, progress: Callable[[dict[str, Any]], None], lock: int) -> Record:
    """The job's record, always: the run's own, or one that says how its processes ended.

    `lock` is a file descriptor that the children inherit and keep open as long as they live. KeyboardInterrupt is
    passed on after they have ended; the record is then on disk.
    """
    attempt = jobs.previous_attempts(Path(job.out)) + 1
    start = time.monotonic()
    with _children(job, lock) as children:
        follower = _Follower(job, children, progress, start)
        try:
            verdict = follower.follow()
        finally:
            follower.links.close()
    verdict = verdict or follower.cause()
    overrule = (follower.blamed not in (None, 0) and not follower.unanimous) or follower.victims
    record = ending.write(job, attempt, verdict, time.monotonic() - start, overrule=overrule)
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


class _Follower:
    """Listens to the ranks until all are done or a deadline passes."""

    def __init__(
        self, job: Job, children: list[Child], progress: Callable[[dict[str, Any]], None], start: float
    ) -> None:
        self.children, self.progress = children, progress
        self.settings = job.config["dispatch"]
        self.deadline = start + self.settings["timeout_s"]
        self.interrupted = False
        self.ends: list[Child] = []
        """Ranks in the order in which they were found to have ended badly."""
        self.blamed: int | None = None
        self.kills_before = ending.kernel_oom_kills()
        self.links = Links(job, children)

    def follow(self) -> Verdict | None:
        """None if every rank ended by itself, or one did badly (`cause` says how); else which deadline passed."""
        open_children = {child.pipe: child for child in self.children}
        heard = dict.fromkeys(self.children, time.monotonic())
        idle: dict[Child, float] = {}
        self.links.begin()
        while open_children:
            try:
                limits = [self.deadline, *(heard[c] + self.settings["heartbeat_s"] for c in open_children.values())]
                wait = max(min(limits) - time.monotonic(), 0)
                ready = select.select(list(open_children), [], [], wait)[0]
                for pipe in ready:
                    child = open_children[pipe]
                    messages = child.hear()
                    if messages is None:
                        del open_children[pipe]
                        self._closed(child)
                        continue
                    heard[child] = time.monotonic()
                    for message in messages:
                        idle[child] = message.get("idle_s", 0.0)
                        self._take(child, message)
                verdict = self._late(ready, list(open_children.values()), heard, idle)
                if verdict:
                    return verdict
            except KeyboardInterrupt:
                if self.interrupted:
                    raise
                self._interrupt()
        return ("interrupted", "signal", "stopped") if self.interrupted else None

    def _interrupt(self) -> None:
        """Asks all ranks to stop; they may take `dispatch.grace_s` for it."""
        self.interrupted = True
        for child in self.children:
            child.interrupt()
        self.deadline = min(self.deadline, time.monotonic() + self.settings["grace_s"])

    def _take(self, child: Child, message: dict[str, Any]) -> None:
        if "progress" in message:
            self.progress(message["progress"])
        if "isolated" in message:
            self.links.isolated(child)
        if "store" in message:
            for other in self.children[1:]:
                other.tell(store=message["store"])
        if "ended" in message:
            child.ended = message["ended"]
            status = message["ended"]["status"]
            if status == "interrupted" and not self.interrupted:  # by somebody else, and perhaps it alone
                self._interrupt()
            elif status not in ("ok", "interrupted"):
                self._bad(child)

    def _closed(self, child: Child) -> None:
        if child.ended is None or child.process.wait() != 0:
            self._bad(child)

    def _bad(self, child: Child) -> None:
        if child not in self.ends:
            self.ends.append(child)
        if len(self.children) > 1:
            self.deadline = min(self.deadline, time.monotonic() + AFTERMATH_S)

    def _late(
        self, ready: list[Any], alive: list[Child], heard: dict[Child, float], idle: dict[Child, float]
    ) -> Verdict | None:
        """Which deadline has passed, if one has. Silence is judged only when nothing is there to read: after a
        suspension the pipes are full, not silent."""
        now = time.monotonic()
        if self.links.fault:
            return "failed", "network", self.links.fault
        if not ready:
            for child in alive:
                if (silent := now - heard[child]) >= self.settings["heartbeat_s"]:
                    error = f"no sign of life for {silent:.1f} s (dispatch.heartbeat_s)"
                    return "hang", "no heartbeat", self._of(child, error)
        if now >= self.deadline and alive:
            if self.ends and not self.interrupted:
                return self.cause()
            if self.interrupted:
                return "interrupted", "signal", f"stopped; not ended by itself in {self.settings['grace_s']:g} s"
            return "timeout", "deadline", f"not done after dispatch.timeout_s={self.settings['timeout_s']:g} s"
        for child in alive:
            if idle.get(child, 0.0) >= self.settings["stall_s"]:
                error = f"alive, but no step done for {idle[child]:.0f} s (dispatch.stall_s)"
                return "hang", "no progress", self._of(child, error)
        return None

    def cause(self) -> Verdict:
        """Of the ranks that ended badly, the one to blame: one that was killed, else the first to end."""
        if not self.ends:
            ended = self.children[0].ended
            assert ended is not None
            return ended["status"], ended["reason"], ended["error"]
        silent = [child for child in self.ends if child.ended is None and child.process.poll() is not None]
        blamed = silent[0] if silent else min(self.ends, key=_when)
        self.blamed = blamed.rank
        if blamed.ended is not None:
            return blamed.ended["status"], blamed.ended["reason"], self._of(blamed, blamed.ended["error"])
        status, reason, error = ending.of_child(blamed.printed(), blamed.process.wait(), self.kills_before)
        return status, reason, self._of(blamed, error)

    @property
    def victims(self) -> bool:
        """The run was interrupted, and rank 0 failed only since another rank had stopped before it."""
        ended = self.children[0].ended
        return self.interrupted and ended is not None and ended["status"] not in ("ok", "interrupted")

    @property
    def unanimous(self) -> bool:
        """Every rank ended the same way, each for itself: rank 0's own record says all that there is to say."""
        return len({(c.ended["status"], c.ended["reason"]) if c.ended else None for c in self.children}) == 1

    def _of(self, child: Child, text: str) -> str:
        return f"rank {child.rank}: {text}" if len(self.children) > 1 else text


def _when(child: Child) -> float:
    """When a rank ended, by the clock that all processes share; one that did not say so, last."""
    return float(child.ended["at"]) if child.ended else math.inf
