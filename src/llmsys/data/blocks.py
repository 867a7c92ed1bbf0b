"""A cheap hash of files, for a run's id. What a record compares by is the exact hash of every example, `Source.hash`.

A file is hashed whole up to 64 MiB. From a larger one 64 blocks of 1 MiB are taken, evenly spread, both ends among
them, with its size: a second at most, whatever the size.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable
from pathlib import Path

BLOCK = 2**20
BLOCKS = 64


def file_hash(path: Path) -> str:
    """Of one file; its name does not count."""
    size = path.stat().st_size
    sha = hashlib.sha256(str(size).encode())
    with open(path, "rb") as file:
        if size <= BLOCK * BLOCKS:
            while part := file.read(BLOCK):
                sha.update(part)
        else:
            for i in range(BLOCKS):
                file.seek((size - BLOCK) * i // (BLOCKS - 1))
                sha.update(file.read(BLOCK))
    return sha.hexdigest()


def folder_hash(root: Path, files: Iterable[Path]) -> str:
    """Of `files`, with their places below `root`; their order does not count."""
    named = sorted((path.relative_to(root).as_posix(), path) for path in files)
    return hashlib.sha256("\n".join(f"{name}\0{file_hash(path)}" for name, path in named).encode()).hexdigest()
