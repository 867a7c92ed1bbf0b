"""The child's side of `dispatch.process`: one rank, which takes its place, gives signs of life, runs and reports."""

from __future__ import annotations

import ctypes
import json
import os
import signal
import sys
import threading
import time
from types import FrameType
from typing import Any

from llmsys.comm import link
from llmsys.comm.place import LOOPBACK, Place, interface_of, listen
from llmsys.context import LightContext
from llmsys.dispatch import memory_limit
from llmsys.dispatch.lines import say
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
        """One message."""
        with self._lock:
            say(self._descriptor, message)


def _hear(key: str) -> Any:
    """What the parent says of `key`; ends this process where the parent has gone."""
    line = sys.stdin.readline()
    if not line:
        raise SystemExit("the parent is gone")
    return json.loads(line)[key]


def _take_place(
    pipe: Pipe, rank: int, world: int, isolated: bool, placed: dict[str, Any]
) -> tuple[Place, dict[str, Any]]:
    """(this rank's place, its link as it is shaped). `placed`: `address`, of this machine, where the ranks are on
    several; `device`: which of the GPUs that this process sees, where it does not see those of all ranks."""
    address = placed.get("address", LOOPBACK)
    found: dict[str, Any] = {"address": address, "interface": interface_of(address)}
    if isolated:
        pipe.send(isolated=True)
        found = _hear("link")
    where = {"address": found["address"], "interface": found["interface"], "device": placed.get("device")}
    if world == 1:
        return Place(**where), found
    if rank == 0:
        listener, port = listen(found["address"])
        pipe.send(store=[found["address"], port])
        return Place(rank=0, world=world, store=(found["address"], port), listener=listener, **where), found
    host, port = _hear("store")
    return Place(rank=rank, world=world, store=(host, port), **where), found


class _Watch:
    """What the parent is told, and what it asks for, while the run goes on."""

    def __init__(self, pipe: Pipe, every_s: float) -> None:
        self.context: LightContext | None = None
        self._pipe, self._every_s = pipe, every_s
        threading.Thread(target=self._tell, daemon=True).start()
        for number in (signal.SIGINT, signal.SIGTERM):  # a shell's background jobs ignore SIGINT; children inherit that
            signal.signal(number, self._stop)

    def _tell(self) -> None:
        while True:
            last = self.context.last_beat if self.context else None
            self._pipe.send(idle_s=0.0 if last is None else time.monotonic() - last)
            time.sleep(self._every_s)

    def _stop(self, number: int, frame: FrameType | None) -> None:
        """A task that can stop between two steps is asked to, however often; any other is stopped at once.

        A signal to all processes comes twice, the second time from the parent, which kills what takes too long.
        """
        if self.context and self.context.stoppable:
            self.context.stop_asked = True
        else:
            raise KeyboardInterrupt

    def see(self, context: LightContext) -> None:
        self.context = context


def main() -> None:
    """`python -m llmsys.dispatch.worker <pipe> <parent pid>`, lines of JSON on standard input."""
    signal.pthread_sigmask(signal.SIG_SETMASK, [])  # a thread of Ray's, which may have started this, blocks all
    pipe, parent = Pipe(int(sys.argv[1])), int(sys.argv[2])
    _die_with_parent(parent)
    first = json.loads(sys.stdin.readline())
    job, rank = Job(**first["job"]), first["rank"]
    settings, placed = job.config["dispatch"], first["placed"]
    if first["switch"] is not None:
        link.isolate(first["switch"])  # before there is a second thread, and before torch makes some
    watch = _Watch(pipe, min(1.0, settings["heartbeat_s"] / 4, settings["stall_s"] / 4))
    place, found = _take_place(pipe, rank, job.config["train"]["world"], first["switch"] is not None, placed)
    memory_limit.set_here(job.config)

    from llmsys import runner

    network = {**found, "shaped": first["switch"] is not None, "why_not": first["unshaped"]}
    record = runner.run(
        job,
        lambda progress: pipe.send(progress=progress) if rank == 0 else None,
        watch.see,
        place=place,
        found={**({"network": network} if place.world > 1 else {}), **placed.get("env", {})},
        ended=lambda record: pipe.send(
            ended={
                "status": record.status,
                "reason": record.reason,
                "error": record.error.split("\n")[0],
                "at": time.monotonic(),
            }
        ),
    )
    sys.stdout.flush()
    sys.stderr.flush()
    # What libraries do at exit (close connections to ranks that may be gone) can block for ever.
    os._exit(0 if record.status in ("ok", "skipped", "interrupted") else 1)


if __name__ == "__main__":
    main()
