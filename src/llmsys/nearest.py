"""What somebody who mistyped a name is told: those that are near it, or those there are."""

from __future__ import annotations

import difflib
from collections.abc import Iterable

MANY = 40


def nearest(name: str, there: Iterable[str], otherwise: str = "") -> str:
    """`did you mean A or B?`; where nothing is near, `there are A, B`, or `otherwise` of more than `MANY`."""
    options = sorted(there)
    near = difflib.get_close_matches(name, options, n=3, cutoff=0.5)
    last = name.rpartition(".")[2]
    near += [each for each in options if each.rpartition(".")[2] == last and each not in near][:3]
    if near:
        return f"did you mean {' or '.join(near)}?"
    return otherwise if otherwise and len(options) > MANY else f"there are {', '.join(options)}"
