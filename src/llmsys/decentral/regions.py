"""Regions in a row or a ring, so that the lines between neighbours are good."""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Sequence

from llmsys.decentral.fleet import Fleet

ALL = 7
"""Regions up to which every ring is looked at; of more each is followed by the one that it reaches best."""


def ring(fleet: Fleet, regions: Iterable[str]) -> list[str]:
    """The one whose thinnest line carries most, of those the one with the shortest delays."""
    names = sorted(set(regions))
    if len(names) < 4:
        return names
    first, *others = names
    if len(names) <= ALL:
        return max(([first, *rest] for rest in itertools.permutations(others)), key=lambda each: _worth(fleet, each))
    found = [first]
    while others:
        found.append(max(others, key=lambda name: _worth(fleet, [found[-1], name])))
        others.remove(found[-1])
    return found


def row(fleet: Fleet, regions: Iterable[str]) -> list[str]:
    """A ring, opened at its thinnest line."""
    names = ring(fleet, regions)
    turned = [names[at:] + names[:at] for at in range(len(names))]
    return min(turned, key=lambda each: _worth(fleet, [each[-1], each[0]])) if len(names) > 1 else names


def _worth(fleet: Fleet, names: Sequence[str]) -> tuple[float, float]:
    lines = [fleet.between_regions(a, b) for a, b in zip(names, [*names[1:], names[0]], strict=True)]
    return min(each.mbit for each in lines), -sum(each.delay_ms for each in lines)
