"""What comes to a broker, looked at before anything follows from it: whose it is, of which job, and of which epoch."""

from __future__ import annotations

import collections
from collections.abc import Callable, Mapping
from typing import Any

from llmsys.decentral.journal import Journal
from llmsys.decentral.members import Members
from llmsys.decentral.reach import BETWEEN, PROBE, PROBED, REACH, Directory
from llmsys.decentral.wire import BEAT, BROKER, TASK_S, Frame, Malformed, decode, header

RELAYED = BETWEEN | {PROBE, PROBED}


class Hearing:
    """`said(frame, now)` gets what is the broker's own to know, `passed_on(name, data)` what one says to another."""

    def __init__(
        self,
        journal: Journal,
        members: Members,
        directory: Directory,
        said: Callable[[Frame, float], None],
        passed_on: Callable[[str, bytes], None],
    ) -> None:
        self.journal, self.members, self.directory = journal, members, directory
        self._said, self._passed_on = said, passed_on
        self.moved_s = 0.0  # when anything but a sign of life was last heard
        self.counters = {"malformed": 0, "foreign": 0, "stale": 0, "refused": 0, "relayed": 0}
        self.task_s: dict[str, float] = {}  # for how long each is at what it does
        self.refusals: collections.deque[str] = collections.deque(maxlen=10)

    def beat(self, name: str, now: float, *, busy: bool, task_s: float = 0.0) -> None:
        """A sign of life of somebody who has something to do, or has not; `task_s`: for how long with one thing."""
        self.moved_s = now if busy else self.moved_s
        self.task_s[name] = task_s
        self.members.beat(name, now)

    def hear(self, sender: str, data: bytes, now: float) -> None:
        """Bytes from a provider, which is known to be `sender`."""
        self.members.heard(sender, now)
        try:
            head = header(data)
            if head["sender"] != sender:
                raise Malformed(f"a frame of {head['sender']}, from {sender}")
            if head["kind"] in RELAYED and head["to"] != BROKER:
                self.moved_s = now if head["kind"] in BETWEEN else self.moved_s
                self._relay(head, data)
                return
            frame = decode(data)
        except Malformed:
            self.counters["malformed"] += 1
            return
        if frame.kind == BEAT and frame.to == BROKER:
            task_s = frame.body.get(TASK_S)
            task_s = task_s if isinstance(task_s, float) else 0.0
            self.beat(sender, now, busy=frame.body.get("busy") is True, task_s=task_s)
            if REACH in frame.body:
                known = self.journal.state.places
                self._guarded(frame, lambda: self.directory.hear(sender, frame.body[REACH], known))
            return
        if frame.to != BROKER or not self._of_this_job(head):
            self.counters["foreign"] += 1
            return
        self.moved_s = now
        if frame.kind == "leave":
            self.members.asked.add(sender)
        elif frame.epoch != self.journal.state.epoch or self.journal.state.plan is None:
            self.counters["stale"] += 1
        else:
            self._guarded(frame, lambda: self._taken(frame, head, len(data), now))

    def _taken(self, frame: Frame, head: Mapping[str, Any], nbytes: int, now: float) -> None:
        self._said(frame, now)
        if frame.tensors:
            self.journal.traffic.passed(head, nbytes)

    def _guarded(self, frame: Frame, what: Callable[[], None]) -> None:
        """Whatever somebody says: what cannot be is counted."""
        try:
            what()
        except (ValueError, KeyError, TypeError, AttributeError, IndexError, ArithmeticError) as error:
            self.counters["refused"] += 1
            self.refusals.append(f"{frame.sender}: {frame.kind}: {type(error).__name__}: {error}")

    def _of_this_job(self, head: Mapping[str, Any]) -> bool:
        """Who has come from another job, and has not been told of this one, may still speak of that one. To go is said
        of no job."""
        return head["job"] == self.journal.state.job.name or head["kind"] == "leave"

    def _relay(self, head: Mapping[str, Any], data: bytes) -> None:
        """Only in this epoch, and only to somebody who is there."""
        state = self.journal.state
        if not self._of_this_job(head):
            self.counters["foreign"] += 1
        elif head["epoch"] != state.epoch:
            self.counters["stale"] += 1
        elif head["to"] in state.present or head["to"] in self.members.leaving:
            self.counters["relayed"] += head["kind"] in BETWEEN
            self.journal.traffic.passed(head, len(data))
            self._passed_on(head["to"], data)
