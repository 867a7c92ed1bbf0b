"""Small files written so that a crash at any instant leaves the old content or the new, never a torn one.

New content is written beside the old under a name with the machine's name and the process's number, and renamed. A kill
leaves that file; the next process that writes there on this machine removes it, as it tells by the number that its
writer is gone. Of another machine's processes, which may write to the same folder, it knows nothing.
"""

from __future__ import annotations

import contextlib
import functools
import glob
import os
import platform
import re
import shutil
from collections.abc import Iterator
from pathlib import Path

MACHINE = re.sub(r"\W", "-", platform.node())


@contextlib.contextmanager
def named(path: Path) -> Iterator[None]:
    """Gives an OSError of this block, which has no file's name where a write fails (a full disk), that of `path`."""
    try:
        yield
    except OSError as error:
        if error.filename is not None:
            raise
        raise OSError(error.errno, error.strerror, str(path)) from error


def write_atomic(path: Path, text: str, mode: int = 0o666) -> None:
    """Replaces `path` by `text` (UTF-8): a temporary file beside it, flushed to disk, then renamed over it. `mode` is
    less the process's mask. OSError with the path where it cannot be written."""
    temporary = beside(path)
    try:
        made = functools.partial(os.open, mode=mode)
        with named(path), open(temporary, "w", encoding="utf-8", opener=made) as file:
            file.write(text)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def beside(path: Path) -> Path:
    """The name `.<name>.<machine>.<process id>` beside `path`, for what is to take its place; first `sweep`."""
    sweep(path)
    return path.with_name(f".{path.name}.{MACHINE}.{os.getpid()}")


def sweep(path: Path, suffix: str = "") -> None:
    """Removes the files and folders `.<name>.<machine>.<process id><suffix>` beside `path` that are of this process or,
    on this machine, of one no longer there. What cannot be removed, another user's say, is left."""
    own = f".{path.name}.{MACHINE}."
    for left in path.parent.glob(f"{glob.escape(own)}*{glob.escape(suffix)}"):
        number = left.name.removeprefix(own).removesuffix(suffix)
        if number.isdecimal() and _gone(int(number)):
            with contextlib.suppress(OSError):
                shutil.rmtree(left) if left.is_dir() else left.unlink()


def _gone(process: int) -> bool:
    if process == os.getpid():
        return True
    try:
        os.kill(process, 0)
    except ProcessLookupError:
        return True
    except (PermissionError, OverflowError):  # another user's; no process's number
        return False
    return False


def cache_folder() -> Path:
    """Where caches lie; the folder need not exist."""
    if own := os.environ.get("LLMSYS_CACHE"):
        return Path(own)
    base = os.environ.get("XDG_CACHE_HOME")
    return (Path(base) if base else Path.home() / ".cache") / "llmsys"
