"""From records to figures, and from figures to files that are the same bytes each time."""

from __future__ import annotations

import importlib
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from llmsys import results
from llmsys.figures.catalogue import PAPERS, Entry
from llmsys.figures.machine import stamp
from llmsys.job import Record
from llmsys.nearest import nearest

COMMITTED = Path(__file__).resolve().parents[3] / "benchmarks" / "records"
"""The published records, in a checkout; a wheel has none."""
FORMATS = ("pdf", "png")
METADATA: dict[str, dict[str, None]] = {"pdf": {"CreationDate": None}, "png": {"Software": None}}
"""Of a file: what would differ from day to day, or between versions of matplotlib."""


def entries(paper: str) -> dict[str, Entry]:
    """The figures of a paper. ValueError lists the papers there are."""
    if paper not in PAPERS:
        raise ValueError(f"{paper}: no such paper; {nearest(paper, PAPERS)}")
    return PAPERS[paper]


def entry(paper: str, name: str) -> Entry:
    """One of them. ValueError lists those there are."""
    found = entries(paper)
    if name not in found:
        raise ValueError(f"{name}: no such figure of {paper}; {nearest(name, found)}")
    return found[name]


def read(paper: str, folder: str | Path | None = None) -> list[Record]:
    """The records that a paper's figures are drawn from, of the experiments' folders in `folder`; where it has none of
    these, all below it. Without `folder` the published ones.

    ValueError where there is no such folder, or no record below it.
    """
    wanted = dict.fromkeys(pattern for each in entries(paper).values() for pattern in each.experiments)
    if folder is None and not COMMITTED.is_dir():
        raise ValueError("--records FOLDER: say where records are; the published ones come with a checkout only")
    root = COMMITTED if folder is None else Path(folder)
    there = [each for pattern in wanted for each in sorted(root.glob(pattern)) if any(each.rglob("record.json"))]
    return [record for each in there or [root] for record in results.read(each)]


def draw(paper: str, name: str, records: Sequence[Record]) -> Any:
    """The figure `name` of `paper`, out of those of `records` that it is about, with their machine below it.

    ValueError for a name that is none, for records that have nothing to draw, and where matplotlib is missing.
    """
    found = entry(paper, name)
    try:
        import matplotlib  # noqa: F401
    except ImportError as error:
        raise ValueError("matplotlib is missing: pip install 'llmsys[notebooks]'") from error
    module, _, function = found.draw.partition(":")
    figure, used = getattr(importlib.import_module(module), function)(records)
    return stamp(figure, used, measured=found.measured)


def save(figure: Any, path: Path) -> Path:
    """Writes `figure` to `path`, whose ending is one of `FORMATS`; the same figure gives the same bytes."""
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=150, metadata=METADATA[path.suffix[1:]])
    return path
