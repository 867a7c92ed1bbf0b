"""Ranks on real links of a given rate and delay, of which nothing can remain.

    rank 0's namespace          the switch's namespace          rank 1's namespace
    eth0 10.77.0.1  <--veth-->  port0 -- bridge -- port1  <--veth-->  eth0 10.77.0.2
    tbf: up_mbit                tbf: down_mbit

Every rank moves into a network namespace of its own before it imports torch (`isolate`: a namespace is a thread's, so
no thread may run yet). A helper process, the `Switch`, sits in one more and makes every device there: a pair of
virtual Ethernet devices for each rank, one end directly in the rank's namespace. No namespace has a name and no device
is ever in the host's, so two networks at once cannot meet, and whatever is killed leaves nothing: the kernel removes a
namespace with its last process, and a pair with either of its ends. The switch ends when its standard input closes,
which the kernel does for a parent that was killed.

Without the right to make namespaces (CAP_SYS_ADMIN) the switch makes a user namespace first, in which it has that
right, and the ranks join it. They leave it again into one below, which shows them under their own user id and without
power over their link. A rank reaches the other ranks and nothing else: no hub, no online tracker.

Burst: a token bucket lets so many bytes through at once after a pause. It is what the link carries in 250 us, so no
message is early by more; between 4 kB (two frames) and 128 kB (enough for 10 Gbit/s, half of a 256 kB bucket).
Segments are held just below it (`gso_max_size`): larger ones are cut frame by frame by the shaper, which at 1 Gbit/s
took 30 % of a core, against 2 %. Measured, one TCP stream on two cores: 19.3 of 20 Mbit/s, 95.7 of 100, 955 of 1000,
9500 of 10000: the frames' headers are the difference.

Only the standard library is imported, and `ip` and `tc` (iproute2) are run.
"""

from __future__ import annotations

import contextlib
import ctypes
import errno
import json
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from llmsys.schema import Network

INTERFACE = "eth0"
"""What every rank's end is called, for GLOO_SOCKET_IFNAME and NCCL_SOCKET_IFNAME."""

_NEWUSER, _NEWNET = 0x10000000, 0x40000000
_BURST_S, _BURST_MIN, _BURST_MAX = 250e-6, 4_000, 128_000
_COMMAND_S = 20.0


@dataclass(frozen=True)
class Link:
    """What a rank got: `address` and `interface` inside its namespace, and the rates and the delay really in effect.

    `notes`: one line on what was asked for and could not be had; empty where all was.
    """

    address: str
    interface: str
    up_mbit: float
    down_mbit: float
    delay_ms: float
    notes: str = ""


def isolate(switch: int) -> None:
    """Moves this process into a network namespace of its own, for `Switch.connect`; `switch` is `Switch.pid`.

    To be called before any thread is started. OSError where the kernel forbids it.
    """
    assert len(os.listdir("/proc/self/task")) == 1, "a namespace is a thread's: isolate() before any is started"
    uid, gid = os.getuid(), os.getgid()
    theirs = Path(f"/proc/{switch}/ns/user")
    if theirs.readlink() == Path("/proc/self/ns/user").readlink():
        _call("unshare", _NEWNET)
        return
    _enter(theirs, _NEWUSER)
    _call("unshare", _NEWNET)
    _call("unshare", _NEWUSER)
    _own_users(inside=(uid, gid), outside=(0, 0))


class Switch:
    """The process that holds the other ends of all links, from here until `close`. A context manager.

    OSError, in one line, where links cannot be made here.
    """

    def __init__(self) -> None:
        if missing := _missing():
            raise OSError(missing)
        self._process = subprocess.Popen(
            [sys.executable, "-I", "-S", os.path.abspath(__file__)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            start_new_session=True,  # Ctrl-C is for the ranks, which then still want to reach each other
        )
        self.pid = self._process.pid
        try:
            self._answer()
        except OSError:
            self.close()
            raise

    def connect(self, pids: list[int], network: Network) -> list[Link]:
        """Links the processes `pids`, rank by rank, all of which have called `isolate`. OSError in one line."""
        assert network.up_mbit, "a network without rates needs no links"
        if len(pids) > 254:
            raise OSError(f"{len(pids)} ranks: the addresses of one network are enough for 254")
        assert self._process.stdin is not None
        rates = {"up": network.up_mbit, "down": network.down_mbit, "delay_ms": network.delay_ms}
        with contextlib.suppress(BrokenPipeError):  # then there is no answer either, and that says more
            self._process.stdin.write(json.dumps({"pids": pids, **rates}).encode() + b"\n")
            self._process.stdin.flush()
        return [Link(**link) for link in self._answer()]

    def close(self) -> None:
        """Ends the switch, and with it all links."""
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        with contextlib.suppress(BrokenPipeError):
            self._process.stdin.close()
        self._process.kill()
        self._process.wait()
        self._process.stdout.close()

    def _answer(self) -> Any:
        assert self._process.stdout is not None
        line = self._process.stdout.readline()
        if not line:
            raise OSError(f"the switch of the shaped links ended by itself (exit code {self._process.wait()})")
        answer = json.loads(line)
        if "error" in answer:
            raise OSError(answer["error"])
        return answer["ok"]

    def __enter__(self) -> Switch:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def why_not() -> str | None:
    """One line on why ranks cannot have shaped links here, or None where they can; found by trying (0.1 s)."""
    try:
        Switch().close()
    except OSError as error:
        return str(error)
    return None


def burst_bytes(mbit: float) -> int:
    """The size of the token bucket of a link; see the file's docstring."""
    return int(min(max(mbit * 1e6 / 8 * _BURST_S, _BURST_MIN), _BURST_MAX))


def _missing() -> str | None:
    if sys.platform != "linux":
        return "shaped links need Linux's network namespaces"
    gone = [program for program in ("ip", "tc") if shutil.which(program, path=_path()) is None]
    return f"shaped links need {' and '.join(gone)}: install iproute2" if gone else None


def _path() -> str:
    """Also where a user's PATH has no /sbin, as on Debian."""
    return os.pathsep.join([os.environ.get("PATH", os.defpath), "/usr/sbin", "/sbin"])


# From here on: the switch's process (`_call`, `_enter` and `_own_users` are the ranks' too).


def _serve() -> None:
    """One line on standard output when the switch is open, then one for each line of standard input."""
    host = Path("/proc/self/ns/net").readlink()
    try:
        has_delay = _open_switch()
        print(json.dumps({"ok": None}), flush=True)
        for line in sys.stdin:
            links = _connect(json.loads(line), host, has_delay)
            print(json.dumps({"ok": [asdict(link) for link in links]}), flush=True)
    except OSError as error:
        print(json.dumps({"error": str(error)}), flush=True)


def _open_switch() -> bool:
    """Moves this process into its namespaces and makes the bridge; whether the kernel can delay packets as well."""
    uid, gid = os.getuid(), os.getgid()
    try:
        _call("unshare", _NEWNET)
    except PermissionError:
        _call("unshare", _NEWUSER | _NEWNET)
        _own_users(inside=(0, 0), outside=(uid, gid))
    _run("ip", ["link add name switch type bridge", "link set switch up addrgenmode none"])
    _run("tc", [f"qdisc add dev lo root {_tbf(1)}"])  # an error now, not after the ranks have been started
    try:
        _run("tc", ["qdisc replace dev lo root netem delay 1ms"])
    except OSError:
        return False
    return True


def _connect(request: dict[str, Any], host: Path, has_delay: bool) -> list[Link]:
    pids, up, down, delay_ms = (request[key] for key in ("pids", "up", "down", "delay_ms"))
    spaces = {Path(f"/proc/{pid}/ns/net").readlink() for pid in pids}
    if host in spaces or len(spaces) < len(pids):
        raise OSError(f"processes {pids}: not each in a network namespace of its own; isolate() comes first")
    notes = ""
    if delay_ms and not has_delay:
        notes = f"network.delay_ms={delay_ms:g}: this kernel has no netem (sch_netem), so links have no added delay"
        delay_ms = 0.0
    ports = [f"port{rank}" for rank in range(len(pids))]
    segment = int(min(burst_bytes(up), burst_bytes(down)) * 0.9)  # with its frames' headers it is below the burst
    settings = f"up addrgenmode none gso_max_size {min(segment, 65536)}"
    lines = []
    for port, pid in zip(ports, pids, strict=True):
        lines.append(f"link add name {port} type veth peer name {INTERFACE} netns {pid}")
        lines.append(f"link set {port} master switch {settings}")
    _run("ip", lines)
    _run("tc", [f"qdisc add dev {port} root {_tbf(down)}" for port in ports])

    shaping = [f"qdisc add dev {INTERFACE} root {_tbf(up)}"]
    if delay_ms:
        waiting = int(up * 1e3 * delay_ms / 8 / 1500) + 1000  # packets: all that the rate lets in during the delay
        shaping = [
            f"qdisc add dev {INTERFACE} root handle 1: netem delay {delay_ms}ms limit {waiting}",
            f"qdisc add dev {INTERFACE} parent 1: {_tbf(up)}",
        ]
    addresses = [f"10.77.0.{rank + 1}" for rank in range(len(pids))]
    for address, pid in zip(addresses, pids, strict=True):
        with _inside(pid):
            _run("ip", ["link set lo up", f"addr add {address}/24 dev {INTERFACE}", f"link set {INTERFACE} {settings}"])
            _run("tc", shaping)
    return [Link(address, INTERFACE, up, down, delay_ms, notes) for address in addresses]


def _tbf(mbit: float) -> str:
    """A shaper of that rate, which holds back up to 100 ms of it before it drops anything."""
    return f"tbf rate {round(mbit * 1e6)}bit burst {burst_bytes(mbit)} latency 100ms"


def _run(program: str, lines: list[str]) -> None:
    """Runs `ip` or `tc` once for all lines. OSError names the line that failed and what the kernel said."""
    env, text = {**os.environ, "PATH": _path(), "LC_ALL": "C"}, "\n".join(lines)
    command = [program, "-batch", "-"]
    done = subprocess.run(command, input=text, capture_output=True, text=True, env=env, timeout=_COMMAND_S, check=False)
    if done.returncode:
        said = done.stderr.strip() or f"exit code {done.returncode}"
        number = re.search(r"Command failed -:(\d+)", said)
        raise OSError(f"{program} {lines[int(number[1]) - 1 if number else 0]}: {said.splitlines()[0]}")


@contextlib.contextmanager
def _inside(pid: int) -> Iterator[None]:
    """This process, and what it starts, is in that process's network namespace for a while."""
    home = os.open("/proc/self/ns/net", os.O_RDONLY)
    try:
        _enter(Path(f"/proc/{pid}/ns/net"), _NEWNET)
        yield
        _call("setns", home, _NEWNET)
    finally:
        os.close(home)


def _enter(namespace: Path, kind: int) -> None:
    descriptor = os.open(namespace, os.O_RDONLY)
    try:
        _call("setns", descriptor, kind)
    finally:
        os.close(descriptor)


def _own_users(inside: tuple[int, int], outside: tuple[int, int]) -> None:
    """In the user namespace just made: (user, group) `outside` of the one above appear as `inside`."""
    try:
        Path("/proc/self/setgroups").write_text("deny")  # else the kernel refuses the map of groups
        for kind, shown, real in zip(("uid", "gid"), inside, outside, strict=True):
            Path(f"/proc/self/{kind}_map").write_text(f"{shown} {real} 1")
    except PermissionError as error:
        raise PermissionError(f"the kernel gives user {outside[0]} no rights in a user namespace") from error


def _call(function: str, *arguments: int) -> None:
    """A call of the C library; OSError says in one line what a refusal means."""
    if getattr(ctypes.CDLL(None, use_errno=True), function)(*arguments) == 0:
        return
    number = ctypes.get_errno()
    if number == errno.EPERM:
        raise PermissionError("the kernel allows this process no network namespace, not in a user namespace either")
    if number == errno.ENOSPC:
        raise OSError("no more namespaces are allowed: /proc/sys/user/max_net_namespaces, max_user_namespaces")
    raise OSError(f"{function}: {os.strerror(number)}")


if __name__ == "__main__":
    _serve()
