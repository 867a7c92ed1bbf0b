"""Messages as lines of JSON through a pipe: how a rank's process, its keeper and its follower speak."""

from __future__ import annotations

import contextlib
import io
import json
import os
from typing import Any


class Lines:
    """The end of a pipe that is read from. `pipe` is readable when there is something to hear."""

    def __init__(self, descriptor: int) -> None:
        self.pipe = io.FileIO(descriptor)
        self._rest = b""

    def hear(self) -> list[dict[str, Any]] | None:
        """The messages that have come; None when the other end is closed. Blocks for one."""
        chunk = self.pipe.read(65536)
        if not chunk:
            return None
        *lines, self._rest = (self._rest + chunk).split(b"\n")
        return [json.loads(line) for line in lines]


def say(descriptor: int, message: dict[str, Any]) -> None:
    """Writes one message, whole; one that nobody reads any more is no error here."""
    view = memoryview(json.dumps(message).encode() + b"\n")
    with contextlib.suppress(BrokenPipeError):
        while view:
            view = view[os.write(descriptor, view) :]
