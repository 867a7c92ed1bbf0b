"""Which rank of a run a process is, and where the ranks meet. Imports no torch: it is known before torch is needed.

The ranks of a run meet at a store that rank 0 serves. Its socket is bound by us, to one address and a port that the
system chooses, and handed over: torch by itself would listen on all interfaces, and a port that is chosen first and
bound later may have been taken in between.
"""

from __future__ import annotations

import contextlib
import fcntl
import socket
import struct
import sys
from dataclasses import dataclass

LOOPBACK = "127.0.0.1"
LOOPBACK_INTERFACE = "lo0" if sys.platform == "darwin" else "lo"
_SIOCGIFADDR = 0x8915
"""Linux: an interface's IPv4 address."""


@dataclass(frozen=True, kw_only=True)
class Place:
    """Rank `rank` of `world`. `address` and `interface` are its own; `store` is where rank 0 serves (host, port).
    `served`: somebody else does. `device`: which of the GPUs that this process sees is its own; None: there is one for
    each rank, in order.

    `listener` is, on rank 0, the descriptor of the listening socket of `store`.
    """

    rank: int = 0
    world: int = 1
    address: str = LOOPBACK
    interface: str = LOOPBACK_INTERFACE
    store: tuple[str, int] | None = None
    listener: int | None = None
    served: bool = False
    device: int | None = None

    @property
    def local_rank(self) -> int:
        """The number of its GPU, in this process."""
        return self.rank if self.device is None else self.device


def interface_of(address: str) -> str:
    """The network interface that has this address; ValueError where none has."""
    if address == LOOPBACK:
        return LOOPBACK_INTERFACE
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as any_socket:
        for _, name in socket.if_nameindex():
            with contextlib.suppress(OSError):  # one without an address
                said = fcntl.ioctl(any_socket, _SIOCGIFADDR, struct.pack("256s", name.encode()[:15]))
                if socket.inet_ntoa(said[20:24]) == address:
                    return name
    raise ValueError(f"no network interface of this machine has the address {address}")


def listen(address: str, port: int = 0) -> tuple[int, int]:
    """(descriptor, port) of a new listening socket at `address`; 0: a port that the system chooses."""
    with socket.socket() as server:
        server.bind((address, port))
        server.listen(128)
        chosen: int = server.getsockname()[1]
        return server.detach(), chosen


def log_name(rank: int) -> str:
    """`log.txt` of rank 0, `log.1.txt` of rank 1."""
    return f"log.{rank}.txt" if rank else "log.txt"
