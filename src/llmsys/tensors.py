"""Safetensors files whose failures are the system's own exceptions."""

from __future__ import annotations

import os
import re
from pathlib import Path
from typing import TYPE_CHECKING

from llmsys.files import beside

if TYPE_CHECKING:
    from torch import Tensor


def save(tensors: dict[str, Tensor], path: Path, meta: dict[str, str] | None = None) -> None:
    """Writes `tensors` (contiguous or not, on any device) to `path`, readable by all; `meta` goes into its header.

    safetensors raises its own exception for a failed write, with the system's error number in its text only: OSError
    is raised in its place, so that a full disk is known as one.
    """
    from safetensors import SafetensorError
    from safetensors.torch import save_file

    try:
        save_file(
            {name: tensor.detach().contiguous() for name, tensor in tensors.items()},
            path,
            {"format": "pt", **(meta or {})},
        )
    except SafetensorError as error:
        number = re.search(r"os error (\d+)", str(error))
        if number is None:
            raise
        raise OSError(int(number[1]), os.strerror(int(number[1])), str(path)) from error
    path.chmod(0o644)  # the library makes it private, which would hide results from other users


def replace(tensors: dict[str, Tensor], path: Path, meta: dict[str, str] | None = None) -> None:
    """As `save`, but a crash at any instant, or a full disk (OSError), leaves the old file or the new one, whole.

    A kill leaves its unfinished file beside it, which the next call removes (`llmsys.files`).
    """
    temporary = beside(path)
    try:
        save(tensors, temporary, meta)
        sync(temporary)
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)
    sync(path.parent)


def sync(path: Path) -> None:
    """Returns when the file's, or the folder's, content is on the disk."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
