"""Ways to part a fleet into groups, each of which is to be a pipeline: rows of providers, and stretches of a row."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator, Sequence

from llmsys.decentral.cost import Costs


def counts(most: int) -> list[int]:
    """1, 2, 3, 4, 6, 8, 12, ... and `most`."""
    found = {n for k in range(20) for n in (2**k, 3 * 2**k) if n <= most}
    return sorted({1, *found, most})


def groups_of(costs: Costs, row: Sequence[int], count: int) -> list[list[int]]:
    """`count` stretches of `row` of about equal speed."""
    speeds = [costs.fleet.providers[p].flops for p in row]
    share, total = sum(speeds) / count, 0.0
    groups: list[list[int]] = [[] for _ in range(count)]
    for p, speed in zip(row, speeds, strict=True):
        groups[min(count - 1, int((total + speed / 2) / share))].append(p)
        total += speed
    return [group for group in groups if group]


def partitions(members: list[int]) -> Iterator[list[list[int]]]:
    """Every set of disjoint groups of some of `members`, but none at all, one group alone among them."""

    def parted(left: list[int]) -> Iterator[list[list[int]]]:
        if not left:
            yield []
            return
        first, rest = left[0], left[1:]
        for count in range(len(rest) + 1):
            for others in itertools.combinations(rest, count):
                remaining = [p for p in rest if p not in others]
                for groups in parted(remaining):
                    yield [[first, *others], *groups]

    for count in range(1, len(members) + 1):
        for some in itertools.combinations(members, count):
            yield from parted(list(some))


def by_memory(costs: Costs, members: Sequence[int]) -> list[int]:
    """The largest first, as 1F1B asks for: the first stage keeps most micro-batches."""
    return sorted(members, key=lambda p: (-costs.fleet.providers[p].mem_gib, -_line(costs, p)))


ROWS: dict[str, Callable[[Costs, Sequence[int]], list[int]]] = {
    "region, line": lambda costs, members: sorted(
        members, key=lambda p: (costs.fleet.providers[p].region, -_line(costs, p), -costs.fleet.providers[p].mem_gib)
    ),
    "line": lambda costs, members: sorted(
        members, key=lambda p: (-_line(costs, p), costs.fleet.providers[p].region, -costs.fleet.providers[p].mem_gib)
    ),
    "region, speed": lambda costs, members: sorted(
        members, key=lambda p: (costs.fleet.providers[p].region, -costs.fleet.providers[p].flops)
    ),
}
"""Ways to put providers in a row, neighbours in which are to be neighbours in a pipeline."""


def _line(costs: Costs, p: int) -> float:
    provider = costs.fleet.providers[p]
    return min(provider.up_mbit, provider.down_mbit)
