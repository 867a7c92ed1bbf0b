"""The figures of the four papers, drawn from records: the same in notebooks and, as files, on the command line.

    python -m llmsys.figures lorafa --out figures --format pdf

    from llmsys import figures
    records = figures.read("lorafa", "benchmarks/records")
    figures.draw("lorafa", "saved", records)        # a matplotlib figure

A figure answers a question (`catalogue`), has units on its axes, error bars where the records have repeats, and below
it the name of the machine that the numbers are from. Nothing is trained or planned here; matplotlib is imported when
the first figure is drawn, and no window or global state knows of any.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from llmsys import lazy

if TYPE_CHECKING:
    from llmsys.figures.catalogue import PAPERS, Entry
    from llmsys.figures.drawing import draw, read, save
    from llmsys.figures.machine import stamp, where

_HOMES = {
    "PAPERS": "catalogue",
    "Entry": "catalogue",
    "draw": "drawing",
    "read": "drawing",
    "save": "drawing",
    "stamp": "machine",
    "where": "machine",
}
"""Name -> module."""

__all__ = ["PAPERS", "Entry", "draw", "read", "save", "stamp", "where"]

__getattr__ = lazy.attributes(__name__, _HOMES)
