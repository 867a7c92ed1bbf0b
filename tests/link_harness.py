"""A network of real processes on shaped links, driven over their standard streams. As a program it is one of them:

python link_harness.py rank SWITCH      isolates itself, then does what it is told, a line at a time
python link_harness.py parent N UP DOWN a parent of N such ranks, which says what they are and waits to be killed
python link_harness.py why              says why there can be no links

It imports link.py from its file, so any Python runs it, also one without this package.
"""

from __future__ import annotations

import contextlib
import ctypes
import json
import os
import select
import signal
import socket
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import SimpleNamespace
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[1] / "src" / "llmsys" / "comm"))
import link

PORT = 29500


class Rank:
    """The parent's end of a rank."""

    def __init__(self, switch: int) -> None:
        self.process = subprocess.Popen(
            [sys.executable, "-B", __file__, "rank", str(switch)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )
        self.pid = self.process.pid

    def tell(self, what: str, **arguments: Any) -> None:
        """An order; its answer is to be fetched by `hear`."""
        assert self.process.stdin is not None
        print(json.dumps([what, arguments]), file=self.process.stdin, flush=True)

    def hear(self) -> Any:
        assert self.process.stdout is not None
        return json.loads(self.process.stdout.readline())

    def ask(self, what: str, **arguments: Any) -> Any:
        self.tell(what, **arguments)
        return self.hear()

    def close(self) -> None:
        for stream in (self.process.stdin, self.process.stdout):
            assert stream is not None
            stream.close()
        self.process.kill()
        self.process.wait()


class Net:
    """A switch, its ranks and their links. A context manager."""

    def __init__(self, world: int, up: float, down: float, delay_ms: float = 0.0) -> None:
        self._stack = contextlib.ExitStack()
        with contextlib.ExitStack() as stack:
            self.switch = stack.enter_context(link.Switch())
            self.ranks = [stack.enter_context(contextlib.closing(Rank(self.switch.pid))) for _ in range(world)]
            for rank in self.ranks:
                assert rank.hear() == "isolated"
            network = SimpleNamespace(up_mbit=up, down_mbit=down, delay_ms=delay_ms)
            self.links = self.switch.connect([rank.pid for rank in self.ranks], network)
            self._stack = stack.pop_all()

    def __enter__(self) -> Net:
        return self

    def __exit__(self, *_: object) -> None:
        self._stack.close()

    def send(self, source: int, target: int, nbytes: int) -> float:
        """Seconds from the target's request to the last of `nbytes` bytes that it receives from the source."""
        self.start(source, target, nbytes)
        return self.finish(source, target)

    def start(self, source: int, target: int, nbytes: int) -> None:
        assert self.ranks[source].ask("listen") is True
        self.ranks[source].tell("serve", nbytes=nbytes)
        self.ranks[target].tell("fetch", address=self.links[source].address, nbytes=nbytes)

    def finish(self, source: int, target: int) -> float:
        assert self.ranks[source].hear() is True
        return float(self.ranks[target].hear())

    def fetch_all(self, target: int, sources: list[int], nbytes: int) -> float:
        """Seconds in which the target gets `nbytes` from each of the sources at once."""
        for source in sources:
            assert self.ranks[source].ask("listen") is True
            self.ranks[source].tell("serve", nbytes=nbytes)
        seconds = self.ranks[target].ask("fetch_all", addresses=[self.links[s].address for s in sources], nbytes=nbytes)
        assert all(self.ranks[source].hear() is True for source in sources)
        return float(seconds)


class Orders:
    """What a rank can be told."""

    def __init__(self) -> None:
        self.listener: socket.socket | None = None

    def listen(self) -> bool:
        self.listener = self.listener or socket.create_server(("", PORT))
        return True

    def serve(self, nbytes: int) -> bool:
        assert self.listener is not None
        connection, _ = self.listener.accept()
        chunk = memoryview(bytes(2**20))
        with connection:
            connection.recv(1)
            while nbytes > 0:
                nbytes -= connection.send(chunk[: min(nbytes, len(chunk))])
        return True

    def fetch(self, address: str, nbytes: int) -> float:
        with socket.create_connection((address, PORT)) as connection:
            start = time.perf_counter()
            connection.sendall(b"?")
            buffer = bytearray(2**20)
            while nbytes > 0:
                got = connection.recv_into(buffer)
                assert got
                nbytes -= got
            return time.perf_counter() - start

    def fetch_all(self, addresses: list[str], nbytes: int) -> float:
        start = time.perf_counter()
        with ThreadPoolExecutor(len(addresses)) as pool:
            list(pool.map(self.fetch, addresses, [nbytes] * len(addresses)))
        return time.perf_counter() - start

    def whoami(self) -> dict[str, Any]:
        return {
            "uid": os.getuid(),
            "interfaces": sorted(name for _, name in socket.if_nameindex()),
            "dies_with_parent": self._death_signal() == signal.SIGKILL,
        }

    def unplugged(self) -> list[str]:
        """The interfaces left when the kernel has taken the link away, some time after the switch's end."""
        with socket.socket(socket.AF_NETLINK, socket.SOCK_RAW, socket.NETLINK_ROUTE) as events:
            events.bind((0, 1))  # RTMGRP_LINK
            while "eth0" in (names := [name for _, name in socket.if_nameindex()]):
                events.recv(2**16)
        return names

    def _death_signal(self) -> int:
        found = ctypes.c_int()
        ctypes.CDLL(None).prctl(2, ctypes.byref(found))  # PR_GET_PDEATHSIG
        return found.value

    def become(self, command: list[str], env: dict[str, str], log: str, heard: bool = False) -> None:
        """This rank is that program from here on; what it says is in the file `log`, or is `heard`, but for errors."""
        with open(log, "ab") as file:
            for descriptor in (2,) if heard else (1, 2):
                os.dup2(file.fileno(), descriptor)
        os.execvpe(command[0], command, {**os.environ, **env})

    def run(self, command: list[str], env: dict[str, str]) -> Any:
        """A program inside this rank's namespace; its standard output has to be JSON."""
        done = subprocess.run(command, capture_output=True, text=True, env={**os.environ, **env}, check=False)
        assert done.returncode == 0, done.stderr
        return json.loads(done.stdout)


def killed(process: subprocess.Popen[str], pids: list[int]) -> None:
    """SIGKILL to the parent alone; returns when all the others have ended as well."""
    watched = [os.pidfd_open(pid) for pid in pids]
    process.kill()
    for descriptor in watched:
        assert select.select([descriptor], [], [], 10)[0], "outlives its parent"
        os.close(descriptor)
    process.wait()
    for stream in (process.stdin, process.stdout):
        assert stream is not None
        stream.close()


def main() -> None:
    if sys.argv[1] == "rank":
        ctypes.CDLL(None).prctl(1, signal.SIGKILL)  # PR_SET_PDEATHSIG
        link.isolate(int(sys.argv[2]))
        print(json.dumps("isolated"), flush=True)
        orders = Orders()
        for line in sys.stdin:
            what, arguments = json.loads(line)
            print(json.dumps(getattr(orders, what)(**arguments)), flush=True)
    elif sys.argv[1] == "parent":
        with Net(int(sys.argv[2]), float(sys.argv[3]), float(sys.argv[4])) as net:
            seconds = net.send(0, 1, 10**6)
            pids = [net.switch.pid, *(rank.pid for rank in net.ranks)]
            print(json.dumps({"pids": pids, "seconds": seconds, "rank": net.ranks[0].ask("whoami")}), flush=True)
            sys.stdin.read()
    else:
        print(link.why_not())


if __name__ == "__main__":
    main()
