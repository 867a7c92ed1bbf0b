"""Memory in use now, and waiting until what a run left behind is gone.

On a GPU the driver is asked, by a child: a process that asks the device itself would hold a context on it all the sweep
long, and be part of what is measured. What the children of a run had allocated is given back when they are gone, but
not at that instant, and not while one of them hangs in the driver. A driver that hangs lets a child hang too; so a look
has an end, and what it does not say by then is not known.
"""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cache
from typing import Any

from llmsys import device

GIB = 2**30
_QUERY = ("nvidia-smi", "--query-gpu=uuid,memory.used,memory.total", "--format=csv,noheader,nounits")
_ASK = """
import torch
for i in range(torch.cuda.device_count()):
    free, total = torch.cuda.mem_get_info(i)
    print(torch.cuda.get_device_properties(i).uuid, (total - free) / 2**20, total / 2**20, sep=",")
"""
_WHICH = """
import torch
for i in range(torch.cuda.device_count()):
    print(torch.cuda.get_device_properties(i).uuid)
"""
EVERY_S = 1.0
"""Between two looks while it is waited."""
LOOK_S = 60.0
"""The most that one question may take. nvidia-smi wakes each GPU that sleeps, and torch is loaded from disk."""
_STUCK: list[subprocess.Popen[bytes]] = []
"""Children that hang in the driver, where no signal reaches them: to wait for one would be to hang too."""


class NotKnown(Exception):
    """The device does not say how much of its memory is in use. The message is one line that says why."""


@dataclass(frozen=True)
class Reading:
    """GiB in use on each device (of a CPU: the host), and of how many."""

    used: tuple[float, ...]
    total: tuple[float, ...]


def read(kind: str) -> Reading:
    """Of all visible CUDA devices, or of the host. On CUDA, the driver by nvidia-smi; where there is none, or it does
    not say (as of a part of a GPU), each device by a child's torch. NotKnown where neither says, or one does not answer
    within `LOOK_S`."""
    if kind == "cpu":
        total = device.host_total()
        return Reading(((total - device.host_available()) / GIB,), (total / GIB,))
    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    own = None if visible is None else _visible(visible, os.environ.get("CUDA_DEVICE_ORDER", ""))
    with contextlib.suppress(_Failed):
        if reading := parsed(_said(_QUERY), own):
            return reading
    try:
        printed = _said((sys.executable, "-c", _ASK))
    except _Failed as error:
        raise NotKnown(f"the devices do not say how much memory is in use: {error}") from None
    if reading := parsed(printed):
        return reading
    raise NotKnown("the devices do not say how much memory is in use: torch sees none")


@cache
def _visible(visible: str, order: str) -> tuple[str, ...]:
    """The UUIDs of the devices behind CUDA_VISIBLE_DEVICES. CUDA counts the fastest first, unless CUDA_DEVICE_ORDER
    says otherwise, and nvidia-smi by the bus: the same number can be another GPU. NotKnown where torch cannot say."""
    try:
        return tuple(_said((sys.executable, "-c", _WHICH)).split())
    except _Failed as error:
        raise NotKnown(f"which devices CUDA_VISIBLE_DEVICES={visible} are is not known: {error}") from None


def parsed(text: str, own: Sequence[str] | None = None) -> Reading | None:
    """Lines of `UUID, used, total` in MiB: of the devices `own`, in that order, or of all. None where one is missing or
    is anything else, as `[N/A]` of a part of a GPU."""
    lines = (line.split(",") for line in text.strip().splitlines())
    found = {_bare(name): pair for name, *pair in lines}
    try:
        wanted = (found[_bare(name)] for name in (found if own is None else own))
        used, total = zip(*((float(used) / 1024, float(total) / 1024) for used, total in wanted), strict=True)
    except (KeyError, ValueError):
        return None
    return Reading(used, total)


def _bare(uuid: str) -> str:
    """As torch prints it: nvidia-smi says first what it is the UUID of."""
    return uuid.strip().lower().removeprefix("gpu-").removeprefix("mig-")


class _Failed(Exception):
    """A command that could not be started or ended badly: the last line that it printed."""


def _said(command: Sequence[str]) -> str:
    """What `command` prints. _Failed where it ends badly, NotKnown where it does not end within `LOOK_S`."""
    name = "torch" if command[0] == sys.executable else command[0]
    with tempfile.TemporaryFile() as out, tempfile.TemporaryFile() as err:
        try:
            child = subprocess.Popen(command, stdin=subprocess.DEVNULL, stdout=out, stderr=err, start_new_session=True)
        except OSError as error:
            raise _Failed(f"{name}: {error.strerror}") from None
        try:
            code = child.wait(LOOK_S)
        except subprocess.TimeoutExpired:
            raise NotKnown(f"{name} did not answer in {LOOK_S:g} s, as where the driver hangs") from None
        finally:
            _end(child)
        out.seek(0)
        err.seek(0)
        if code:
            printed = (err.read() or out.read()).decode(errors="replace").strip().splitlines()
            raise _Failed(f"{name}: {printed[-1] if printed else f'exit code {code}'}")
        return out.read().decode(errors="replace")


def _end(child: subprocess.Popen[bytes]) -> None:
    """Ends a child that has not ended, with what it started; does not wait for one that cannot be ended."""
    if child.poll() is not None:
        return
    with contextlib.suppress(ProcessLookupError):
        os.killpg(child.pid, signal.SIGKILL)
    try:
        child.wait(1.0)
    except subprocess.TimeoutExpired:
        _STUCK.append(child)


class Baseline:
    """Memory in use at the sweep's start, which is to be reached again before each run.

    A GPU that has not reached it is left alone: the run is not made. Beside what holds the device it would be slower,
    and its record final, and whoever reads records would have to know. The same command, which begins with another
    baseline, makes it. The memory of a host is also everybody else's, and a browser that was opened is nothing that a
    run left behind: there the run is made. If it runs out of memory, that is neither final nor a witness against others
    (`Record.doubtful`); nor is it of a GPU that did not say how much was in use.

    `gib`: how much more may be in use (None: nothing is looked at). `look`, `clock` and `sleep` are the world.
    """

    def __init__(
        self,
        gib: float | None,
        timeout_s: float,
        look: Callable[[], Reading],
        clock: Callable[[], float] = time.monotonic,
        sleep: Callable[[float], None] = time.sleep,
    ) -> None:
        self._gib, self._timeout_s = gib, timeout_s
        self._look, self._clock, self._sleep = look, clock, sleep
        self._first: Reading | None = None

    def wait(self) -> dict[str, Any]:
        """Returns when memory is back, or when the time is up: what a record says of it, {} where it was back at once.

        `clean`: whether it was back at last; None where that is not known, and `why`. `over_baseline_gib`: of the
        device that is furthest from its baseline, how far; negative below it. ValueError where the first look, which is
        the baseline, finds nothing.
        """
        if self._gib is None:
            return {}
        if self._first is None:
            try:
                self._first = self._look()
            except NotKnown as error:
                raise ValueError(
                    f"sweep.baseline_gib={self._gib:g}: {error}; sweep.baseline_gib=null runs without looking"
                ) from None
            return {}
        start, looks = self._clock(), 1
        try:
            while (over := self._over()) > self._gib and self._clock() - start < self._timeout_s:
                looks += 1
                self._sleep(min(EVERY_S, self._timeout_s))
        except NotKnown as error:
            return {"clean": None, "why": str(error), "waited_s": round(self._clock() - start, 1)}
        if looks == 1 and over <= self._gib:
            return {}
        waited = round(self._clock() - start, 1)
        return {"clean": over <= self._gib, "over_baseline_gib": round(over, 3), "waited_s": waited}

    def _over(self) -> float:
        assert self._first is not None
        used, before = self._look().used, self._first.used
        if len(used) != len(before):
            raise NotKnown(f"{len(used)} devices answer, and at the sweep's start it was {len(before)}")
        return max(now - then for now, then in zip(used, before, strict=True))


def doubt(found: dict[str, Any]) -> str:
    """In a line, why a run may have had less memory than there is: of what `Baseline.wait` returned."""
    if found["clean"] is None:
        return f"whether memory was back at what it was at the sweep's start is not known: {found['why']}"
    over = f"{found['over_baseline_gib']:.2f} GiB more in use than at the sweep's start"
    return f"{over}, also after {found['waited_s']:g} s (sweep.baseline_timeout_s)"


def why_not(found: dict[str, Any]) -> str:
    """The same of a run that is not made."""
    return f"not run: {doubt(found)}; the same command tries again, sweep.baseline_gib=null does not look"
