"""Data sets as the `datasets` library keeps them: a folder it saved, a folder of its files, or a hub id.

Which columns are what is said by `data.columns`, in one of four shapes (`llmsys.schema.data.COLUMNS`): running text, a
pair, an instruction, or one or two texts with a class.

Nothing is executed. A saved folder is Arrow tables and JSON. In a folder of files only *.parquet, *.jsonl and *.csv are
opened, whatever else lies beside them, each by a reader of `rows` and not by what `datasets` would infer. Of the hub
only data sets in plain formats are taken: `datasets` runs no scripts from 4.0 on, and its reader of pickles is not
among those allowed here.

Regression, as GLUE's STS-B has it, is not carried: a class must be a name or a whole number.
"""

from __future__ import annotations

import itertools
import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from llmsys import schema
from llmsys.data import blocks, rows
from llmsys.data.examples import Example, by_content, template
from llmsys.errors import MissingPackage

HUB_ID = re.compile(r"^\w[\w.-]*/[\w.-]+$")
PLAIN = ("parquet", "json", "csv", "arrow", "text", "cache")
"""The readers of `datasets` that a hub id may use; `cache` is what it downloaded before."""
_BATCH = 1000

Names = tuple[str, ...]
Table = tuple[Iterator[rows.Row], Names | None]
"""A split's rows, and the classes of its label column where that says them."""


def read(cfg: schema.Data, objective: str) -> tuple[list[Example], list[Example], Names]:
    """(training split, validation split, labels). Raises ValueError, one line, for a folder, split, column or value
    that is not what it should be; LookupError for a hub id that cannot be had, or a missing library."""
    tables = [_open(cfg, name) for name in (cfg.train_split, cfg.val_split) if name]
    picked = [[(where, _picked(cfg, where, row)) for where, row in table] for table, _ in tables]
    labels: tuple[Any, ...] = ()
    if "label" in cfg.columns:
        names = tables[0][1]
        values = range(len(names)) if names else _distinct(picked[0])
        labels = names or tuple(values)
        numbers = {value: i for i, value in enumerate(values)}
        for where, row in itertools.chain(*picked):
            row["label"] = _number(numbers, where, row["label"])
    splits = [[_example(cfg, objective, where, row) for where, row in rows] for rows in picked]
    train, val = splits if cfg.val_split else by_content(splits[0], cfg.val_percent)
    return train, val, tuple(map(str, labels))


def content_hash(cfg: schema.Data) -> str:
    """See `sources.content_hash`."""
    folder = _folder(cfg)
    if folder is None:
        return str(cfg.path)
    if _saved(folder):
        return blocks.folder_hash(folder, [*folder.rglob("*.arrow"), *folder.rglob("dataset_info.json")])
    return blocks.folder_hash(
        folder, {path for name in (cfg.train_split, cfg.val_split) if name for path in _files(folder, name)}
    )


def _folder(cfg: schema.Data) -> Path | None:
    """The folder that `data.path` names, None where it is a hub id."""
    path = Path(str(cfg.path)).expanduser()
    if path.is_dir():
        if cfg.subset:
            raise ValueError(f"data.subset={cfg.subset}: is for a hub id; data.path={cfg.path} is a folder")
        return path
    if path.is_file():
        raise ValueError(f"data.path={cfg.path}: is a file; data=hub reads a folder, data=jsonl a file")
    if HUB_ID.match(str(cfg.path)) and not cfg.make:
        return None
    raise ValueError(f"data.path={cfg.path}: no such folder (from {Path.cwd()}){cfg.how_to_make}")


def _open(cfg: schema.Data, split: str) -> Table:
    folder = _folder(cfg)
    if folder is None or _saved(folder):
        dataset = _download(cfg, split) if folder is None else _load(cfg, folder, split)
        names = getattr(dataset.features.get(cfg.columns.get("label")), "names", None)
        return _arrow(dataset, f"{cfg.path}: {split}"), tuple(names) if names else None
    files = _files(folder, split)
    names = rows.class_names(files[0], cfg.columns["label"]) if "label" in cfg.columns else None
    return (row for path in files for row in rows.READERS[path.suffix](path)), names


def _saved(folder: Path) -> bool:
    return (folder / "dataset_dict.json").is_file() or (folder / "state.json").is_file()


def _files(folder: Path, split: str) -> list[Path]:
    """The split's files: `train.jsonl`, `train-00000-of-00002.parquet`, or whatever lies in a folder `train`."""
    found = [path for path in sorted(folder.rglob("*")) if path.suffix in rows.READERS]
    stem = re.compile(rf"{re.escape(split)}(-\d+(-of-\d+)?)?")
    files = [path for path in found if stem.fullmatch(path.stem) or split in path.relative_to(folder).parts[:-1]]
    if not files:
        there = ", ".join(path.relative_to(folder).as_posix() for path in found[:5]) or "none that is read"
        raise ValueError(
            f"{folder}: no file of the split {split} (it is {split}.<suffix>, {split}-00000-of-00001.<suffix> or in a "
            f"folder {split}; the suffix one of {' '.join(rows.READERS)}); there are {there}"
        )
    if len({path.suffix for path in files}) > 1:
        raise ValueError(f"{folder}: the split {split} is there twice: {files[0].name} and {files[-1].name}")
    return files


def _library() -> Any:
    try:
        import datasets
    except ModuleNotFoundError:
        raise MissingPackage("data=hub: needs the datasets library: pip install 'llmsys[train]'") from None
    return datasets


def _load(cfg: schema.Data, folder: Path, split: str) -> Any:
    """A split of a folder that `datasets` saved."""
    described = folder / "dataset_dict.json"
    if described.is_file():
        splits = json.loads(described.read_text("utf-8"))["splits"]
        if split not in splits:
            raise ValueError(f"{folder}: no split {split} (data.train_split, data.val_split); there are {splits}")
        folder = folder / split
    elif cfg.val_split:
        raise ValueError(f"data.val_split={cfg.val_split}: {folder} is one split; data.val_split=null cuts it")
    try:
        return _library().Dataset.load_from_disk(str(folder))
    except (OSError, ValueError, KeyError, TypeError) as error:  # what `datasets` raises for a damaged folder
        raise ValueError(f"{folder}: not a folder that datasets saved: {_line(error)}") from error


def _download(cfg: schema.Data, split: str) -> Any:
    """A split of the hub, from the library's cache where it is there."""
    datasets = _library()
    try:
        builder = datasets.load_dataset_builder(cfg.path, cfg.subset)
        reader = type(builder).__module__.split(".")[-1]
        if reader not in PLAIN:
            raise ValueError(f"its format is {reader}, not one of {', '.join(PLAIN)}")
        builder.download_and_prepare()
        return builder.as_dataset(split=split)
    except OSError as error:  # no network, offline by HF_DATASETS_OFFLINE, no such repository
        raise LookupError(
            f"data.path={cfg.path}: no folder here (from {Path.cwd()}), and the hub does not give it: {_line(error)}"
        ) from error
    except ValueError as error:
        raise ValueError(f"data.path={cfg.path} (data.subset={cfg.subset}): {_line(error)}") from error


def _line(error: Exception) -> str:
    return (str(error).strip() or type(error).__name__).splitlines()[0]


def _arrow(dataset: Any, where: str) -> Iterator[rows.Row]:
    number = 0
    for batch in dataset.with_format("arrow").iter(_BATCH):
        for row in batch.to_pylist():
            number += 1
            yield f"{where} row {number}", row


def _picked(cfg: schema.Data, where: str, row: dict[str, Any]) -> dict[str, Any]:
    """What `data.columns` names, by its part: texts, and the label as it is. `input` may be empty."""
    result = {}
    for part, column in cfg.columns.items():
        value = _value(row, column)
        if value is _ABSENT:
            raise ValueError(f"{where}: no column {column} (data.columns.{part}); there are {', '.join(row)}")
        if part == "input" and value is None:
            value = ""
        if part != "label" and not isinstance(value, str):
            raise ValueError(f"{where}: {column} (data.columns.{part}) is {type(value).__name__}, not text")
        result[part] = value
    return result


_ABSENT = object()


def _value(row: Any, column: str) -> Any:
    """`translation.de` is the column of that name, or else `de` inside `translation`."""
    if not isinstance(row, dict):
        return _ABSENT
    if column in row:
        return row[column]
    head, _, rest = column.partition(".")
    return _value(row[head], rest) if rest and head in row else _ABSENT


def _distinct(picked: list[rows.Row]) -> list[Any]:
    """The label values of the training split, sorted: numbers by size, also where a CSV file spells them."""
    for where, row in picked:
        if not isinstance(row["label"], str | int):
            kind = type(row["label"]).__name__
            raise ValueError(f"{where}: the label is {kind}; a class is a name or a whole number (no regression)")
    values = {row["label"] for _, row in picked}
    if len({type(value) for value in values}) > 1:
        raise ValueError(f"{picked[0][0]}: the labels are partly names and partly numbers")
    return sorted(values, key=int if all(str(value).isdecimal() for value in values) else None)


def _number(numbers: dict[Any, int], where: str, value: Any) -> int:
    if value not in numbers:
        raise ValueError(
            f"{where}: the label {value!r} is none of the {len(numbers)} classes of the training split; "
            "splits without labels (GLUE's test) cannot be used"
        )
    return numbers[value]


def _example(cfg: schema.Data, objective: str, where: str, row: dict[str, Any]) -> Example:
    before = cfg.prefix if objective == "seq2seq" else ""
    if "label" in row:
        return Example(row["text"], pair=row.get("text_pair"), label=row["label"], origin=where)
    if "text" in row:
        return Example(row["text"], origin=where)
    if "source" in row:
        # A causal LM reads both sides in one line of tokens: the break says where the target begins.
        prompt = cfg.prefix + row["source"] + ("\n" if objective == "causal_lm" else "")
        return Example(row["target"], prompt=prompt, origin=where)
    prompt = before + template(row["instruction"], row.get("input", ""))
    return Example(row["output"], prompt=prompt, origin=where)
