"""What DeepSpeed compiles on its first use: by one process, in our own folder, and again where that one was killed.

torch compiles an extension while a file `lock` lies beside it. A killed process leaves it there, and everyone after it
waits for ever. Our folder is under a lock that ends with its process: whoever holds that one and still finds `lock`
finds a dead process's. A folder that the user chose, by `TORCH_EXTENSIONS_DIR`, others may be compiling in: there
nothing is removed.
"""

from __future__ import annotations

import fcntl
import hashlib
import importlib.metadata
import logging
import os
import sys
from pathlib import Path

from llmsys.files import cache_folder, named

VARIABLE = "TORCH_EXTENSIONS_DIR"


def load(builder: str) -> None:
    """Compiles what DeepSpeed's `builder` (`CPUAdamBuilder`) stands for, if it is not, and loads it; nothing where this
    device has no such part. DeepSpeed finds it loaded then. OSError where the folder cannot be written."""
    from deepspeed.accelerator import get_accelerator

    made = get_accelerator().create_op_builder(builder)
    if made is None or not made.is_compatible(verbose=False):
        return
    root = folder()
    os.environ.setdefault(VARIABLE, str(root))  # torch's cpp_extension reads it
    if os.environ[VARIABLE] != str(root):
        made.load(verbose=False)
        return
    with named(root):
        root.mkdir(parents=True, exist_ok=True)
        lock = os.open(root / ".lock", os.O_RDWR | os.O_CREAT)
    try:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            _log().info("waiting for the process that compiles in %s", root)
            fcntl.flock(lock, fcntl.LOCK_EX)
        for left in root.glob("*/lock"):
            _log().info("%s: was left by a process that was killed while it compiled; removed", left)
            left.unlink()
        if not (root / made.name / f"{made.name}.so").exists():
            _log().info("compiling DeepSpeed's %s, once: a minute, several on a busy machine", made.name)
        made.load(verbose=False)
    finally:
        os.close(lock)


def folder() -> Path:
    """Of this environment's libraries: another's would be compiled again, and this one's after that."""
    versions = [importlib.metadata.version(package) for package in ("torch", "deepspeed")]
    place = "|".join([sys.prefix, sys.version, *versions])
    return cache_folder() / "extensions" / hashlib.sha256(place.encode()).hexdigest()[:16]


def _log() -> logging.Logger:
    return logging.getLogger("llmsys")
