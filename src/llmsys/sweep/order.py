"""In which order the cells of a sweep run.

`predicted` is ascending: what is predicted to need least memory first. Along the axes that prune, this makes the fewest
runs that there can be. Every cell that fits has to run, and so has every one that does not and has none below it that
does not either: nothing else could be its witness. All others have a witness that ran before them, if the order never
puts a cell before one that it covers. So the runs are these two kinds in any such order, and no order makes fewer.
Descending would learn nothing: the largest running out of memory says nothing of smaller ones.

A prediction need not grow where memory must. So a cell counts with the largest prediction of all that it covers, which
does, and of equals the one that covers fewer comes first.
"""

from __future__ import annotations

import math
import random
from collections.abc import Callable, Sequence

from llmsys.sweep.prune import Point


def ascending(costs: Sequence[float | None], points: Sequence[Point | None]) -> list[int]:
    """Places of the cells, least predicted memory first; those without a prediction (None) after all others, as listed.

    No cell comes before one that it covers and does not equal.
    """
    known = [math.inf if cost is None else cost for cost in costs]
    below = [[j for j in range(len(points)) if _covers(points[i], points[j]) or i == j] for i in range(len(points))]
    key = [max(known[j] for j in below[i]) for i in range(len(points))]
    return sorted(range(len(points)), key=lambda i: (key[i], len(below[i]), i))


def _covers(one: Point | None, other: Point | None) -> bool:
    return one is not None and other is not None and one.covers(other)


def rounds(repeats: int, order: Callable[[int], list[int]]) -> list[tuple[int, int]]:
    """(cell, repeat) of a whole sweep: every cell once, then every cell once more, so that whatever drifts while the
    sweep lasts falls on all cells alike. `order(repeat)`: the places of the cells in that round."""
    return [(cell, repeat) for repeat in range(repeats) for cell in order(repeat)]


def shuffled(cells: int, seed: int, repeat: int) -> list[int]:
    """The places in a random order, another one in each round."""
    places = list(range(cells))
    random.Random(f"{seed} {repeat}").shuffle(places)
    return places
