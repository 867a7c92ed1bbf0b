"""The child's side of `dispatch.process`: reads a job, limits itself, gives signs of life, runs, and reports."""

from __future__ import annotations

import contextlib
import ctypes
import json
import os
import resource
import signal
import sys
import threading
import time
from typing import Any

from llmsys.context import Context
from llmsys.job import Job

_PR_SET_PDEATHSIG = 1


def _die_with_parent(parent: int) -> None:
    """An orphan would go on using the machine: the kernel kills this process when its parent dies (Linux)."""
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
    if os.getppid() != parent:
        os._exit(1)


class Pipe:
    """Writes messages to the parent, from any thread; a parent that no longer listens is not an error here."""

    def __init__(self, descriptor: int) -> None:
        os.set_inheritable(descriptor, False)
        self._descriptor = descriptor
        self._lock = threading.Lock()

    def send(self, **message: Any) -> None:
        """One message, as one line of JSON."""
        view = memoryview(json.dumps(message).encode() + b"\n")
        with self._lock, contextlib.suppress(BrokenPipeError):
            while view:
                view = view[os.write(self._descriptor, view) :]


def _signs_of_life(pipe: Pipe, every_s: float) -> list[Context]:
    """Starts a thread that tells the parent for how long no step was done; returns where to put the context."""
    watched: list[Context] = []

    def tell() -> None:
        while True:
            last = watched[0].last_beat if watched else None
            pipe.send(idle_s=0.0 if last is None else time.monotonic() - last)
            time.sleep(every_s)

    threading.Thread(target=tell, daemon=True).start()
    return watched


def main() -> None:
    """`python -m llmsys.dispatch.worker <pipe> <parent pid>`, the job as JSON on standard input."""
    pipe, parent = Pipe(int(sys.argv[1])), int(sys.argv[2])
    _die_with_parent(parent)
    for number in (signal.SIGINT, signal.SIGTERM):  # a shell's background jobs ignore SIGINT, and children inherit that
        signal.signal(number, signal.default_int_handler)
    job = Job(**json.load(sys.stdin))
    settings = job.config["dispatch"]
    watched = _signs_of_life(pipe, min(1.0, settings["heartbeat_s"] / 4, settings["stall_s"] / 4))
    if settings["memory_gib"] is not None:
        limit = int(settings["memory_gib"] * 2**30)
        resource.setrlimit(resource.RLIMIT_DATA, (limit, limit))

    from llmsys import runner

    runner.run(job, lambda progress: pipe.send(progress=progress), watched.append)


if __name__ == "__main__":
    main()
