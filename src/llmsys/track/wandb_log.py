"""The file of a W&B run (`run-<id>.wandb`), read as far as it goes: W&B's service does not say that a disk is full.

It is a log in LevelDB's format: a header of 7 bytes, then blocks of 32 KiB, in which a record is one chunk or several:

    checksum (4 bytes) | length (2) | kind (1): whole, first, middle, last | payload
"""

from __future__ import annotations

import struct
from collections.abc import Iterator
from pathlib import Path
from typing import Any

_HEADER, _BLOCK = 7, 32 * 1024
_CHUNK = struct.Struct("<IHB")
_WHOLE, _FIRST, _LAST = 1, 2, 4


def records(path: Path) -> Iterator[Any]:
    """The records in the file, as W&B's protocol has them; ends at the first that is cut off. OSError where there is no
    such file."""
    from google.protobuf.message import DecodeError
    from wandb.proto.wandb_internal_pb2 import Record

    for payload in _payloads(path.read_bytes()):
        try:
            yield Record.FromString(payload)
        except DecodeError:
            return


def complete(path: Path) -> bool:
    """Whether the file goes on to the run's end."""
    return path.exists() and any(record.HasField("exit") for record in records(path))


def _payloads(data: bytes) -> Iterator[bytes]:
    at, begun = _HEADER, b""
    while True:
        if _BLOCK - at % _BLOCK < _CHUNK.size:  # no chunk begins in the last bytes of a block
            at += _BLOCK - at % _BLOCK
        if at + _CHUNK.size > len(data):
            return
        _, length, kind = _CHUNK.unpack_from(data, at)
        chunk = data[at + _CHUNK.size : at + _CHUNK.size + length]
        if len(chunk) < length or not kind:
            return
        at += _CHUNK.size + length
        begun = chunk if kind in (_WHOLE, _FIRST) else begun + chunk
        if kind in (_WHOLE, _LAST):
            yield begun
