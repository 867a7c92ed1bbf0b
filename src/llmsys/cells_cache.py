"""The cells of all records below a folder, kept in a Parquet file so that only what has changed is read again.

One row of the file is one cell: `record` (its number), `key`, and `number` or, as JSON, `value`. The file's metadata
name the records, each with size, modification time and inode, and a hash of the code that made the cells (`MAKERS`);
other code makes all of them stale. It lies beside the records, or, where that cannot be written, in the cache folder. A
cache that cannot be read or written costs a line in the log, and nothing else.
"""

from __future__ import annotations

import functools
import hashlib
import json
import logging
import os
import threading
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy

from llmsys import record_files
from llmsys.cells import Cells, cells, merged
from llmsys.files import beside, cache_folder
from llmsys.record_files import Found
from llmsys.rows import row

NAME = ".llmsys-cache.parquet"
LEAST = 1000
"""Records below which there is no cache: they are read in a quarter of a second."""
MAKERS = ("cells", "cells_cache", "flat", "job", "record_files", "rows", "schema/compress", "tasks")
"""The modules that turn a record into cells; a test finds those by what is called. To hash them takes a millisecond,
the whole package a fifth of a cached load."""
_YOUNG_NS = 2_000_000_000
"""A record written so shortly ago could be written again without its modification time showing it, where file systems
count time in steps of up to two seconds: it is read anew the next time."""
_LOG = logging.getLogger("llmsys")
_ONE_AT_A_TIME = threading.Lock()


def load(root: str | Path, *, cache: bool = True) -> Cells:
    """The cells of all records below `root`, in the order of their paths. ValueError as of `record_files.find`."""
    found = record_files.find(root)
    cache = cache and len(found) >= LEAST
    held = _read(Path(root)) if cache else None
    if held is not None and held[0] == found:
        return held[1]
    with record_files.no_collection():
        there, made = _brought_up(root, found, *(held or ([], cells([]))))
    if not there:
        raise record_files.nothing(root)
    if cache and (held is None or there != held[0]):
        _write(Path(root), there, made)
    return made


def _brought_up(root: str | Path, found: list[Found], known: list[Found], old: Cells) -> tuple[list[Found], Cells]:
    """Of what is found the records that can be read, and their cells: where nothing changed `old`, those of `known`."""
    fresh = set(found) & set(known)
    now, rows, new = time.time_ns(), [], []
    for each in found:
        if each not in fresh and (made := _row(root, each)) is not None:
            rows.append(made)
            new.append(each._replace(mtime_ns=-1) if abs(now - each.mtime_ns) < _YOUNG_NS else each)
    if not fresh:
        return new, cells(rows)
    there = sorted([*fresh, *new], key=lambda each: each.path.split("/"))
    place = {each: index for index, each in enumerate(there)}
    return there, merged(old, [place.get(each, -1) for each in known], cells(rows), [place[each] for each in new])


@functools.cache
def code() -> str:
    """Hex digits over the source of `MAKERS`."""
    digest = hashlib.sha256()
    for name in MAKERS:
        digest.update(name.encode() + b"\0" + (Path(__file__).parent / f"{name}.py").read_bytes())
    return digest.hexdigest()[:12]


def _row(root: str | Path, found: Found) -> dict[str, Any] | None:
    """The row of a record, or None where there is none to be read, which is said."""
    try:
        record = record_files.record(os.path.join(root, found.path), samples=False)
    except (ValueError, OSError) as error:
        record_files.left_out(error)
        return None
    return None if record is None else row(record)


def places(root: Path) -> list[Path]:
    """Where the cache of `root` can be, the first that serves: beside the records, in the cache folder."""
    whole = hashlib.sha256(os.fsencode(root.resolve())).hexdigest()[:24]
    return [root / NAME, cache_folder() / "results" / f"{whole}.parquet"]


def _read(root: Path) -> tuple[list[Found], Cells] | None:
    """What was kept by this code, or None."""
    try:
        import pyarrow
        import pyarrow.parquet
    except ImportError:
        return None
    for path in places(root):
        try:
            # buffers, not a map: another process may replace the file meanwhile
            file = pyarrow.parquet.ParquetFile(
                path, read_dictionary=["key", "value"], page_checksum_verification=True, memory_map=False
            )
            about = json.loads(file.metadata.metadata[b"llmsys"])
            if about["code"] == code():
                return [Found(*each) for each in about["records"]], _cells(file.read(), len(about["records"]))
        except FileNotFoundError:
            continue
        except (OSError, pyarrow.ArrowException, ValueError, KeyError, TypeError) as error:
            _LOG.warning("%s: no cache that can be read, so records are read instead: %s", path, _line(error))
    return None


def _cells(table: Any, count: int) -> Cells:
    coded = {}
    for name in ("key", "value"):
        column = table[name].unify_dictionaries().combine_chunks()
        codes = column.indices.fill_null(-1).to_numpy(zero_copy_only=False).astype(numpy.int32, copy=False)
        coded[name] = codes, column.dictionary.to_pylist()
    return Cells(
        count=count,
        keys=coded["key"][1],
        values=json.loads(f"[{','.join(coded['value'][1])}]"),
        key=coded["key"][0],
        row=table["record"].to_numpy(),
        code=coded["value"][0],
        number=table["number"].to_numpy(),
    )


def _write(root: Path, records: Sequence[Found], held: Cells) -> None:
    try:
        table = _table(records, held)
    except ImportError:
        _LOG.warning("no cache of results: pyarrow is missing: pip install 'llmsys[train]'")
        return
    about = json.dumps({"code": code(), "records": records})
    said = []
    for path in places(root):
        try:
            with _ONE_AT_A_TIME:
                _replace(path, table, about)
            return
        except OSError as error:
            said.append(_line(error))
    _LOG.warning("no cache of results: %s", "; ".join(said))


def _table(records: Sequence[Found], held: Cells) -> Any:
    import pyarrow

    said = json.JSONEncoder().encode
    coded = held.code >= 0
    value = pyarrow.DictionaryArray.from_arrays(
        pyarrow.array(held.code, mask=~coded), pyarrow.array([said(each) for each in held.values], pyarrow.string())
    )
    columns = {
        "record": held.row,
        "key": pyarrow.DictionaryArray.from_arrays(held.key, pyarrow.array(held.keys, pyarrow.string())),
        "number": pyarrow.array(held.number, mask=coded),
        "value": value,
    }
    return pyarrow.table(columns)


def _replace(path: Path, table: Any, about: str) -> None:
    """Writes `table` beside `path` and renames it over it. OSError where it cannot be written."""
    import pyarrow.parquet

    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = beside(path)
    try:
        with pyarrow.parquet.ParquetWriter(
            temporary,
            table.schema,
            use_dictionary=["key", "value"],
            dictionary_pagesize_limit=2**30,
            column_encoding={"record": "DELTA_BINARY_PACKED"},  # they rise: a third of the file
            compression="lz4",
            write_page_checksum=True,
            write_statistics=False,
            store_schema=False,
        ) as writer:
            writer.write_table(table, row_group_size=max(1, table.num_rows))  # one dictionary
            writer.add_key_value_metadata({"llmsys": about})
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def _line(error: Exception) -> str:
    return str(error).splitlines()[0] if str(error) else type(error).__name__
