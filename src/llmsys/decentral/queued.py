"""A folder of jobs that a broker runs one after another, each a file of the words that `python -m llmsys` takes.

FOLDER/*.txt       what waits, in the order of the names; more may be put there at any time
FOLDER/running/    the one under way: a broker that was killed begins with it again, and it goes on
FOLDER/done/       with the folder of the run, in a comment
FOLDER/failed/     with why, in a comment: moved back to FOLDER, such a file is tried again
"""

from __future__ import annotations

import os
import shlex
from collections.abc import Sequence
from pathlib import Path

from llmsys.files import write_atomic

VARIABLE = "LLMSYS_DECENTRAL_QUEUE"
"""The folder, for the broker of the job under way, who says what waits."""
RUNNING, DONE, FAILED = "running", "done", "failed"


def waiting(folder: Path) -> list[Path]:
    """In their order."""
    return sorted(path for path in folder.glob("*.txt") if not path.name.startswith("."))


def state() -> dict[str, list[str]] | None:
    """Names of jobs that wait, that were done, and that failed, of the queue that this process's job is of; None: of
    none."""
    if VARIABLE not in os.environ:
        return None
    folder = Path(os.environ[VARIABLE])
    folders = {"waiting": folder, DONE: folder / DONE, FAILED: folder / FAILED}
    return {name: [path.stem for path in waiting(each)] for name, each in folders.items()}


def put(folder: Path, words: Sequence[str], what: str, name: str = "") -> Path:
    """A new file, behind all that there have ever been, or of this `name`. FileExistsError where that is taken."""
    folder.mkdir(parents=True, exist_ok=True)
    given = folder / f".{os.getpid()}.new"
    write_atomic(given, "".join(f"{shlex.quote(word)}\n" for word in words))
    try:
        number = 1 + max((_number(path) for path in folder.rglob("*.txt")), default=0)
        while True:
            path = folder / (f"{name}.txt" if name else f"{number:04d}-{what}.txt")
            try:
                os.link(given, path)  # whole at once, and never over another's
            except FileExistsError:
                if name:
                    raise FileExistsError(f"{path}: is there already") from None
                number += 1
                continue
            return path
    finally:
        given.unlink()


def _number(path: Path) -> int:
    first = path.name.partition("-")[0]
    return int(first) if first.isdecimal() else 0


def words_of(text: str) -> list[str]:
    """Of a file: words as in a shell, over any lines; what is behind a # is a comment. ValueError for a quotation that
    does not end."""
    return shlex.split(text, comments=True)


def moved(path: Path, to: Path) -> Path:
    """Under its own name, or, where another has that, with a number behind it."""
    new, number = to / path.name, 1
    while new.exists() and new != path:
        number += 1
        new = to / f"{path.stem}.{number}.txt"
    os.replace(path, new)
    return new
