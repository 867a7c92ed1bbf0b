"""What really went over a network interface, by the kernel's own count."""

from __future__ import annotations

from pathlib import Path

from llmsys.comm.link import INTERFACE


def wire_bytes(interface: str = INTERFACE) -> tuple[int, int]:
    """(sent, received) bytes of the interface since it was made, as this process's network namespace sees it.
    ValueError where there is no such interface.

    Collectives count what they are asked to carry; this is what the carrying took: headers (a frame's, or once for a
    segment of many frames that a virtual interface passes whole), acknowledgements and what was sent again.
    """
    for line in Path("/proc/self/net/dev").read_text().splitlines():
        name, _, counts = line.partition(":")
        if name.strip() == interface:
            fields = counts.split()  # eight counts of what was received, then eight of what was sent
            return int(fields[8]), int(fields[0])
    raise ValueError(f"{interface}: there is no such network interface")
