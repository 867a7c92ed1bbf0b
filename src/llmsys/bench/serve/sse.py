"""Server-sent events: the `data` of each, from bytes as they come (HTML Living Standard, 9.2.6)."""

from __future__ import annotations

from collections.abc import Iterator

LONGEST = 16 << 20
"""Bytes of one event; more are none."""


class Events:
    """Feed it bytes in pieces of any size, and it yields what each event that is complete says."""

    def __init__(self) -> None:
        self._rest = b""
        self._data: list[bytes] = []

    def feed(self, piece: bytes) -> Iterator[bytes]:
        """ValueError for an event that is too long."""
        lines = (self._rest + piece).replace(b"\r\n", b"\n").split(b"\n")
        self._rest = lines.pop()
        if len(self._rest) + sum(map(len, self._data)) > LONGEST:
            raise ValueError(f"an event of more than {LONGEST >> 20} MiB")
        for line in lines:
            if not line:
                if self._data:
                    yield b"\n".join(self._data)
                    self._data = []
            elif line.startswith(b"data:"):
                self._data.append(line[6:] if line[5:6] == b" " else line[5:])
