"""`metrics.jsonl`: one JSON object a line, flushed at once, so that a crash loses nothing that was written."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from llmsys.files import named, write_atomic


class JsonLines:
    """An append-only file of rows. A row is written whole, or (disk full, kill) cut off at the end."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def row(self, row: dict[str, Any]) -> None:
        """Appends `row`. OSError where the disk is full."""
        with named(self.path), open(self.path, "a", encoding="utf-8") as file:
            file.write(json.dumps(row) + "\n")

    def trim(self, step: int) -> None:
        """Keeps the rows of steps 1 to `step`; a torn last line goes too. ValueError as `read`."""
        if step <= 0:
            self.path.unlink(missing_ok=True)
        elif self.path.exists():
            write_atomic(self.path, "".join(json.dumps(row) + "\n" for row in self._until(step)))

    def count(self, step: int) -> int:
        """How many rows there are of steps 1 to `step`. ValueError as `read`."""
        return len(self._until(step)) if self.path.exists() else 0

    def _until(self, step: int) -> list[dict[str, Any]]:
        return [row for row in read(self.path) if 1 <= row.get("step", 0) <= step]


def read(path: Path) -> list[dict[str, Any]]:
    """The whole rows of a file; a last line that a crash cut off is left out, any other bad line is a ValueError."""
    rows: list[dict[str, Any]] = []
    try:
        lines = path.read_text(encoding="utf-8").split("\n")
    except UnicodeDecodeError as error:
        raise ValueError(f"{path}: not rows of metrics: {error}") from error
    for number, line in enumerate(lines, 1):
        if not line:
            continue
        try:
            rows.append(json.loads(line))
        except json.JSONDecodeError as error:
            if number == len(lines):
                break
            raise ValueError(f"{path}:{number}: not a row of metrics: {error}") from error
    return rows
