"""How much a provider gives at most: bytes over its line, hours that it is there, FLOPs by its own count.

Of one life of the process or, with a file, of all that have the file: it is written every few seconds, so that a life
that is killed forgets no more than these.
"""

from __future__ import annotations

import json
import math
import sys
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from llmsys.files import write_atomic

GIB = 2**30
NEAR = 0.9
"""Of the bytes: whoever goes hands its state over, and that is traffic, too. A tenth is enough where that is less."""
LOOK_S = 0.2
WRITE_S = 5.0


class Meter:
    """What has been given: `nbytes`, `seconds`, `flops`. A line and its provider tell it, each from its own thread."""

    def __init__(self, nbytes: int = 0, seconds: float = 0.0, flops: float = 0.0) -> None:
        self.nbytes, self.flops, self._seconds = nbytes, flops, seconds
        self._since: float | None = None

    def here(self) -> None:
        """The broker has let it in."""
        self._since = time.monotonic()

    def away(self) -> None:
        self._seconds, self._since = self.seconds, None

    @property
    def seconds(self) -> float:
        since = self._since
        return self._seconds + (time.monotonic() - since if since is not None else 0.0)


@dataclass(frozen=True, kw_only=True)
class Quota:
    """At most so much. ValueError for what is not positive."""

    gib: float = math.inf
    hours: float = math.inf
    tflop: float = math.inf

    def __post_init__(self) -> None:
        for key in ("gib", "hours", "tflop"):
            if not getattr(self, key) > 0:
                raise ValueError(f"--quota-{key} {getattr(self, key)}: must be positive")

    def reached(self, used: Meter) -> str:
        """Which of them is used up, or nearly so, in words; empty: none."""
        given = (
            (used.nbytes / GIB, self.gib, self.gib * NEAR, "GiB of traffic"),
            (used.seconds / 3600, self.hours, self.hours, "hours"),
            (used.flops / 1e12, self.tflop, self.tflop, "TFLOP"),
        )
        return ", ".join(f"{have:.4g} of {most:g} {what}" for have, most, near, what in given if have >= near)


def read(path: Path) -> Meter:
    """What a file says; nothing where there is none. ValueError for a file that is something else."""
    if not path.exists():
        return Meter()
    try:
        given = json.loads(path.read_text(encoding="utf-8"))
        values = {key: float(given[key]) for key in ("nbytes", "seconds", "flops")}
        if not all(0 <= value < math.inf for value in values.values()):
            raise ValueError("must be 0 or more")
    except (ValueError, KeyError, TypeError) as error:
        raise ValueError(f"--quota-file {path}: is none: {type(error).__name__}: {error}") from None
    return Meter(int(values["nbytes"]), values["seconds"], values["flops"])


class Watch:
    """`quota` of what `path` (None: no file) says and what is given from now on, looked at by a thread that calls
    `leave(why)` once it is reached. ValueError where that is so already."""

    def __init__(self, quota: Quota, path: Path | None) -> None:
        self.quota, self.path = quota, path
        self.meter = Meter() if path is None else read(path)
        self._writing = threading.Lock()
        if found := quota.reached(self.meter):
            raise ValueError(f"the quota is used up: {found}; give more, or begin a new --quota-file")
        self.write()

    def begin(self, leave: Callable[[str], None]) -> None:
        threading.Thread(target=self._look, args=(leave,), name="quota", daemon=True).start()

    def _look(self, leave: Callable[[str], None]) -> None:
        wrote, said, told = time.monotonic(), False, False
        while True:
            time.sleep(LOOK_S)
            if not said and (found := self.quota.reached(self.meter)):
                said = True
                leave(found)
            if time.monotonic() > wrote + WRITE_S:
                wrote = time.monotonic()
                try:
                    self.write()
                except OSError as error:  # a full disk: the quota counts all the same
                    if not told:
                        told = True
                        print(f"llmsys.decentral: --quota-file {self.path}: {error.strerror or error}; what is used is "
                              "counted, and cannot be written", file=sys.stderr, flush=True)  # fmt: skip

    def write(self) -> None:
        used = self.meter
        if self.path is not None:
            with self._writing:
                given = {"nbytes": used.nbytes, "seconds": used.seconds, "flops": used.flops}
                write_atomic(self.path, json.dumps(given) + "\n")
