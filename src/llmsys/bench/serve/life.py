"""A server that we start: a process, healthy or said not to be, and gone with whoever started it.

Between us and it stands a keeper (this file, run as a program): it starts the command in a session of its own, and ends
it with all that it has started when its standard input ends, which happens however its parent goes.
"""

from __future__ import annotations

import asyncio
import contextlib
import ctypes
import os
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

from llmsys.dispatch.child import descendants, kill_tree
from llmsys.errors import MissingPackage

try:
    import aiohttp
    from yarl import URL
except ModuleNotFoundError as error:
    raise MissingPackage(f"task=bench_serve: needs {error.name}: pip install 'llmsys[serve]'") from None

SHOWN = 5
"""Last lines of a server's log that are told where it does not come up."""
END_S = 10.0
CONNECT_S = 10.0
LOOK_S = 0.1
PR_SET_PDEATHSIG, PR_SET_CHILD_SUBREAPER = 1, 36
"""Of Linux's prctl(2): a signal when the parent ends; to be the parent of all below whose own has ended."""


class NotUp(RuntimeError):
    """A server that did not become healthy, with the end of its log."""


class Life:
    """Of `command`, which says what it has to say into `log`."""

    def __init__(self, command: Sequence[str], log: Path, env: Mapping[str, str] | None = None) -> None:
        self.command, self.log, self.env = list(command), log, dict(env or {})
        self.process: subprocess.Popen[bytes] | None = None

    def start(self) -> None:
        """NotUp where there is no such command."""
        self.log.parent.mkdir(parents=True, exist_ok=True)
        with self.log.open("wb") as file:
            self.process = subprocess.Popen(
                [sys.executable, "-m", "llmsys.bench.serve.life", *self.command],
                stdin=subprocess.PIPE,
                stdout=file,
                stderr=file,
                env={**os.environ, **self.env},
                start_new_session=True,
            )

    @property
    def ended(self) -> int | None:
        """Its exit code, once it has ended."""
        assert self.process is not None
        return self.process.poll()

    async def healthy(self, url: str, within_s: float, looking: Callable[[], None] = lambda: None) -> float:
        """Waits until `url` answers 200, and says how many seconds that took; `looking()` all the time. NotUp where it
        ends or does not."""
        begun = time.perf_counter()
        async with aiohttp.ClientSession(timeout=aiohttp.ClientTimeout(total=5)) as session:
            while time.perf_counter() < begun + within_s:
                looking()
                if self.ended is not None:
                    raise NotUp(f"the server ended with code {self.ended}: {self.said()}")
                with contextlib.suppress(aiohttp.ClientError, OSError, TimeoutError):
                    async with session.get(url) as answer:
                        if answer.status == 200:
                            return time.perf_counter() - begun
                await asyncio.sleep(LOOK_S)
        raise NotUp(f"the server was not healthy in {within_s:g} s: {self.said()}")

    def said(self) -> str:
        """The last lines of its log."""
        lines = self.log.read_text(encoding="utf-8", errors="replace").strip().splitlines()
        return " | ".join(lines[-SHOWN:]) or "it said nothing"

    def stop(self) -> None:
        """It, and all that it has started."""
        if self.process is None:
            return
        assert self.process.stdin is not None
        with contextlib.suppress(OSError):
            self.process.stdin.close()
        try:
            self.process.wait(END_S + 5)
        except subprocess.TimeoutExpired:
            kill_tree(self.process)


async def listening(url: str) -> None:
    """NotUp where nobody takes a connection."""
    where = URL(url)
    try:
        async with asyncio.timeout(CONNECT_S):
            _, line = await asyncio.open_connection(where.host, where.port)
    except TimeoutError:
        raise NotUp(f"server.url={url}: nobody answers in {CONNECT_S:g} s") from None
    except OSError as error:
        raise NotUp(f"server.url={url}: nobody listens there: {error.strerror or error}") from None
    line.close()
    with contextlib.suppress(OSError):
        await line.wait_closed()


def free_port() -> int:
    """Of loopback, where nobody listens now."""
    with socket.socket() as made:
        made.bind(("127.0.0.1", 0))
        return int(made.getsockname()[1])


def _prctl(option: int, value: int) -> None:
    """Where there is Linux."""
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(option, value, 0, 0, 0)


def _die_with_the_keeper() -> None:
    _prctl(PR_SET_PDEATHSIG, signal.SIGKILL)


def _end_all() -> None:
    """All below this process. Whoever left its own parent's group, or has none any more, is below it too."""
    while below := [*descendants(os.getpid())]:
        for pid in below:
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        with contextlib.suppress(ChildProcessError):
            while os.waitpid(-1, os.WNOHANG)[0]:
                pass


def keep(command: Sequence[str]) -> int:
    """Runs it until it ends, or standard input does; its exit code, 127 where there is no such command."""
    _prctl(PR_SET_CHILD_SUBREAPER, 1)
    try:
        child = subprocess.Popen(
            command, stdin=subprocess.DEVNULL, start_new_session=True, preexec_fn=_die_with_the_keeper
        )
    except OSError as error:
        print(f"{command[0]}: {error.strerror}", file=sys.stderr)
        return 127

    def end() -> None:
        while os.read(0, 1 << 16):  # unbuffered: Python may end while this thread is still here
            pass
        with contextlib.suppress(ProcessLookupError):
            os.killpg(child.pid, signal.SIGTERM)
        with contextlib.suppress(subprocess.TimeoutExpired):
            child.wait(END_S)
        kill_tree(child)

    threading.Thread(target=end, daemon=True).start()
    code = child.wait()
    kill_tree(child)
    _end_all()
    return code if code >= 0 else 128 - code


if __name__ == "__main__":
    sys.exit(keep(sys.argv[1:]))
