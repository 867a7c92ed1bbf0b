"""Which rank of a run a process is, and where the ranks meet. Imports no torch: it is known before torch is needed.

The ranks of a run meet at a store that rank 0 serves. Its socket is bound by us, to one address and a port that the
system chooses, and handed over: torch by itself would listen on all interfaces, and a port that is chosen first and
bound later may have been taken in between.
"""

from __future__ import annotations

import socket
import sys
from dataclasses import dataclass

LOOPBACK = "127.0.0.1"
LOOPBACK_INTERFACE = "lo0" if sys.platform == "darwin" else "lo"


@dataclass(frozen=True, kw_only=True)
class Place:
    """Rank `rank` of `world`. `address` and `interface` are its own; `store` is where rank 0 serves (host, port).

    `listener` is, on rank 0, the descriptor of the listening socket of `store`.
    """

    rank: int = 0
    world: int = 1
    address: str = LOOPBACK
    interface: str = LOOPBACK_INTERFACE
    store: tuple[str, int] | None = None
    listener: int | None = None


def listen(address: str) -> tuple[int, int]:
    """(descriptor, port) of a new listening socket at `address`."""
    with socket.socket() as server:
        server.bind((address, 0))
        server.listen(128)
        port: int = server.getsockname()[1]
        return server.detach(), port


def log_name(rank: int) -> str:
    """`log.txt` of rank 0, `log.1.txt` of rank 1."""
    return f"log.{rank}.txt" if rank else "log.txt"
