"""Records as files: where they lie below a folder, and reading many of them fast.

A table needs no samples, which are three quarters of what records hold. So where a file is laid out as `Record.to_json`
lays it out, its samples are cut away before the rest is parsed. They are looked at all the same: what is left of them
without the characters of numbers has to be names and brackets; anything else is parsed whole, and judged by the schema.
"""

from __future__ import annotations

import contextlib
import gc
import json
import os
import re
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

from llmsys.job import Record

_START = b'\n "samples": {'
_END = b'\n },\n "'
_CUT = "cut away"
_OF_NUMBERS = b"0123456789.eE+-, \n"
_LISTS = re.compile(rb'\{(?:"[^"\\]*":\[\])*\}')


class Found(NamedTuple):
    """A `record.json` as it was found: its path below the folder, and what changes when it is written again."""

    path: str
    mtime_ns: int
    size: int
    inode: int


def find(root: str | Path) -> list[Found]:
    """All `record.json` below `root`, in the order of their paths; of what is beside them, links to folders are not
    followed, and a folder that cannot be listed is named on standard error. ValueError if there is no such folder, or
    nothing below it."""
    if not Path(root).is_dir():
        raise ValueError(f"{root}: no such folder")
    found = []
    for path, entry in _walk(os.fspath(root)):
        with contextlib.suppress(FileNotFoundError):  # gone meanwhile
            stat = entry.stat()
            found.append(Found(path, stat.st_mtime_ns, stat.st_size, stat.st_ino))
    if not found:
        raise nothing(root)
    return sorted(found, key=lambda each: each.path.split("/"))


def nothing(root: str | Path) -> ValueError:
    """What is said of a folder without records."""
    return ValueError(f"{root}: no record.json below it; runs write them to results/<experiment>/<run id>/")


def _walk(root: str) -> Iterator[tuple[str, os.DirEntry[str]]]:
    below = [""]
    while below:
        folder = below.pop()
        try:
            with os.scandir(os.path.join(root, folder)) as entries:
                for entry in entries:
                    if entry.is_dir(follow_symlinks=False):
                        below.append(f"{folder}{entry.name}/")
                    elif entry.name == "record.json":
                        yield folder + entry.name, entry
        except FileNotFoundError:  # gone meanwhile
            continue
        except OSError as error:
            left_out(error)


def left_out(error: Exception) -> None:
    """Says on standard error what cannot be read, and why."""
    print(f"llmsys.results: left out: {error}", file=sys.stderr)


def record(path: str, *, samples: bool) -> Record | None:
    """The record in the file `path`, without its samples if they are not wanted; None where it is gone. ValueError
    names a file that is none."""
    try:
        with open(path, "rb", buffering=0) as file:
            data = file.read()
    except FileNotFoundError:
        return None
    try:
        return Record.from_json(data.decode()) if samples else _without_samples(data)
    except (ValueError, TypeError) as error:
        raise ValueError(f"{path}: {error}") from error


def _without_samples(data: bytes) -> Record:
    start = data.find(_START) + len(_START) - 1
    end = data.find(_END, start) + 3
    if start >= len(_START) - 1 and end > 2 and _LISTS.fullmatch(data[start:end].translate(None, _OF_NUMBERS)):
        values = json.loads(b"%s%s%s" % (data[:start], json.dumps(_CUT).encode(), data[end:]))
        # JSON's text has no line breaks within strings, so this was a key; and if it shows here, the record's own
        if isinstance(values, dict) and values.get("samples") == _CUT:
            values["samples"] = {}
            return Record.from_values(values)
    parsed = Record.from_json(data.decode())
    parsed.samples = {}
    return parsed


@contextlib.contextmanager
def no_collection() -> Iterator[None]:
    """Without Python's search for cycles, of which JSON has none: over ten thousand records it took as long as the
    parsing itself (1.7 s of 3.4 s)."""
    was = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if was:
            gc.enable()
