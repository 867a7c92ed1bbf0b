"""Rows of local files, one dict at a time, with the place each stands at: JSON lines, CSV and Parquet.

These three formats hold plain values and nothing that is executed when read.
"""

from __future__ import annotations

import csv
import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from llmsys.errors import MissingPackage

Row = tuple[str, dict[str, Any]]
"""(where it stands, for a message; column -> value)."""


def json_lines(path: Path) -> Iterator[Row]:
    """One JSON object per line; empty lines are passed over. ValueError names the line that is none."""
    for number, line in enumerate(path.read_bytes().split(b"\n"), start=1):
        if not line.strip():
            continue
        where = f"{path}:{number}"
        if number == 1 and line.lstrip().startswith(b"["):
            raise ValueError(f"{where}: a JSON array; one object per line is read (jq -c '.[]' {path} makes that)")
        try:
            row = json.loads(line)
        except ValueError as error:  # not JSON, or not UTF-8
            raise ValueError(f"{where}: not JSON: {error}") from error
        if not isinstance(row, dict):
            raise ValueError(f'{where}: not an object, as {{"text": ...}} is one')
        yield where, row


def csv_lines(path: Path) -> Iterator[Row]:
    """Comma-separated with a header; every value is a string. ValueError names the line that does not fit."""
    with open(path, encoding="utf-8", newline="") as file:
        reader = csv.DictReader(file, strict=True)
        try:
            for row in reader:
                where = f"{path}:{reader.line_num}"
                if None in row or None in row.values():
                    raise ValueError(f"{where}: not the {len(reader.fieldnames or [])} columns of the header")
                yield where, row
        except (csv.Error, UnicodeDecodeError) as error:
            raise ValueError(f"{path}:{reader.line_num}: not CSV in UTF-8: {error}") from error


def parquet(path: Path) -> Iterator[Row]:
    """ValueError for a file that is no Parquet; LookupError without pyarrow."""
    file = _parquet(path)
    number = 0
    for batch in file.iter_batches():
        for row in batch.to_pylist():
            number += 1
            yield f"{path}: row {number}", row


def class_names(path: Path, column: str) -> tuple[str, ...] | None:
    """The names of a ClassLabel column, which `datasets` writes into a Parquet file's header; None without them."""
    if path.suffix != ".parquet":
        return None
    header = _parquet(path).schema_arrow.metadata or {}
    features = json.loads(header.get(b"huggingface", b"{}")).get("info", {}).get("features", {})
    names = features.get(column, {}).get("names")
    return None if names is None else tuple(names)


def _parquet(path: Path) -> Any:
    try:
        import pyarrow
        from pyarrow.parquet import ParquetFile
    except ModuleNotFoundError:
        raise MissingPackage(f"{path}: reading Parquet needs pyarrow: pip install 'llmsys[train]'") from None
    try:
        return ParquetFile(path)
    except pyarrow.ArrowInvalid as error:
        raise ValueError(f"{path}: not a Parquet file: {str(error).splitlines()[0]}") from None


READERS: dict[str, Callable[[Path], Iterator[Row]]] = {".parquet": parquet, ".jsonl": json_lines, ".csv": csv_lines}
"""File suffix -> its reader."""
