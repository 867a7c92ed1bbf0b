"""One rank's keeper on its node: starts the rank's process there, and passes on what it says and what it is told.

The rank itself is the same process as anywhere (`child`): what Ray's worker has loaded is not in it, and it ends with
this one.
"""

from __future__ import annotations

import contextlib
import fcntl
import json
import os
from pathlib import Path
from typing import Any

from llmsys.comm.place import log_name
from llmsys.dispatch.child import Child, kill_tree
from llmsys.job import Job, Record


class Keeper:
    """Its methods are called from several threads: `hear` blocks while the others go on."""

    def __init__(self, job: dict[str, Any], rank: int) -> None:
        self.job, self.rank = Job(**job), rank
        self.child: Child | None = None

    def start(self) -> None:
        """The process. A rank that an earlier attempt has left on this machine, and that is still ending, is waited
        for: it holds the lock."""
        lock = os.open(Path(self.job.out) / f".{log_name(self.rank)}.lock", os.O_RDWR | os.O_CREAT, 0o644)
        try:
            fcntl.flock(lock, fcntl.LOCK_EX)
            self.child = Child(self.job, self.rank, lock)
        finally:
            os.close(lock)

    def hear(self) -> list[dict[str, Any]] | None:
        """As of a `follow.Rank`."""
        assert self.child is not None
        return self.child.hear()

    def tell(self, line: str) -> None:
        """A message, as JSON."""
        assert self.child is not None
        self.child.tell(**json.loads(line))

    def interrupt(self) -> None:
        if self.child is not None:
            self.child.interrupt()

    def end(self) -> dict[str, Any]:
        """When there is no more to hear: `code`, `verdict` of a rank that did not say how it ended, and of rank 0 the
        `record` that it has written, as JSON: a file system between machines may show it late."""
        assert self.child is not None
        code, record = self.child.code(), ""
        if self.rank == 0:
            with contextlib.suppress(ValueError, OSError):
                found = Record.read(Path(self.job.out))
                record = found.to_json() if found else ""
        return {"code": code, "verdict": self.child.verdict(), "record": record}

    def kill(self) -> None:
        """The process, and all that it started."""
        if self.child is not None:
            kill_tree(self.child.process)
