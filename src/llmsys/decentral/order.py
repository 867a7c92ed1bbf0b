"""Which providers, and in which order: the search around the exact cuts of `cuts`.

Of a few providers all orders of all subsets are gone through, from the pipeline's end, and what a beginning cannot
mend is left: the plan is the best there is. Of more, local search: providers are dropped, swapped, put in, replaced,
moved, and stretches turned round, while that helps; from several orders, among them those of the baselines, so that no
pipeline of theirs is better.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Iterator, Sequence
from typing import NamedTuple

import numpy as np

from llmsys.decentral.cost import Costs
from llmsys.decentral.cuts import CLOSE, Cut, Reach
from llmsys.schema.decentral import OBJECTIVES

ALL = 6
"""Providers up to which everything is tried."""


class Pipeline(NamedTuple):
    """Providers by place, in order; `cuts` with both ends; `seconds` of what was minimised."""

    order: tuple[int, ...]
    cuts: tuple[int, ...]
    seconds: float


class Search:
    """For one objective: `throughput`, the slowest stage, or `latency`, the sum. ValueError for another."""

    def __init__(self, costs: Costs, objective: str = "throughput") -> None:
        if objective not in OBJECTIVES:
            raise ValueError(f"objective={objective}: must be one of {', '.join(OBJECTIVES)}")
        self.costs, self.reach, self.objective = costs, Reach(costs), objective
        self.so_far = math.inf

    def cut(self, order: Sequence[int], below: float = math.inf) -> Pipeline | None:
        """The best cuts of an order, where they are better than `below`."""
        find: Callable[..., Cut | None] = getattr(self.reach, self.objective)
        found = find(order, below)
        return None if found is None else Pipeline(tuple(order), *found)

    def best(self, members: Sequence[int]) -> Pipeline | None:
        """Of any order of any of `members`; None where no pipeline of them holds the chain."""
        if len(members) <= ALL:
            return self.all_orders(members)
        best = self.first(members)
        return None if best is None else self.improved(best, members)

    def first(self, members: Sequence[int]) -> Pipeline | None:
        """The best of a few orders."""
        found = [each for start in self.starts(members) if (each := self.cut(start)) is not None]
        return min(found, key=lambda each: each.seconds, default=None)

    def all_orders(self, members: Sequence[int]) -> Pipeline | None:
        """The best of all orders of all subsets: a good one first, and then whether any is better."""
        best = self.first(members)
        best = None if best is None else self.improved(best, members)
        self.so_far = best.seconds if best else math.inf
        for order in self._promising(members):
            if (found := self.cut(order, self.so_far)) is not None:
                best, self.so_far = found, found.seconds
        return best

    def improved(self, best: Pipeline, members: Sequence[int]) -> Pipeline:
        """By local search, as far as it goes."""
        while True:
            for order in neighbours(best.order, members):
                found = self.cut(order, best.seconds * (1 - 1e-9))
                if found is not None:
                    best = found
                    break
            else:
                return best

    def starts(self, members: Sequence[int]) -> Iterator[list[int]]:
        """Orders to begin at, none with more providers than there are stages to be had."""
        providers, most = self.costs.fleet.providers, len(self.reach.places) - 1
        by_speed = sorted(members, key=lambda p: -providers[p].flops)
        by_memory = sorted(members, key=lambda p: -providers[p].mem_gib)
        for order in (by_speed, by_memory, list(members), self.fenced(members)):
            yield order[:most]
            yield sorted(order[:most])
        yield from ([p] for p in members)

    def fenced(self, members: Sequence[int]) -> list[int]:
        """Along good links: from the provider with the best, always on to the one that is reached best."""
        rates = -np.log(np.array([[self.costs.beta(p, q) if p != q else math.inf for q in members] for p in members]))
        rates = np.minimum(rates, rates.T)
        at = int(np.argmax(np.where(np.isfinite(rates), rates, -np.inf).max(axis=1)))
        order, left = [at], set(range(len(members))) - {at}
        while left:
            at = max(left, key=lambda q: (rates[order[-1], q], self.costs.fleet.providers[members[q]].flops))
            order.append(at)
            left.remove(at)
        return [members[at] for at in order]

    def _promising(self, members: Sequence[int]) -> Iterator[tuple[int, ...]]:
        """Orders that may be better than `so_far`, as it is when they are asked for: suffixes grow from the end of the
        chain, while what is left of it can be done by those that are left in time."""
        reach, providers = self.reach, self.costs.fleet.providers
        latency = self.objective == "latency"
        fastest = max(providers[p].flops for p in members)

        def grown(suffix: tuple[int, ...], state: np.ndarray, before: int | None) -> np.ndarray | None:
            """`state` from the first of `suffix` on, if `before` comes before it; None where nothing can."""
            limit = self.so_far * (1 - CLOSE)
            if latency:
                state, _ = reach.sooner(state, suffix[0], before, len(suffix) - 1)
                return state if (state + reach.flops / fastest).min() < limit else None
            behind = suffix[1] if len(suffix) > 1 else None
            state = reach.step(state, limit, suffix[0], before, behind, len(suffix) - 1)
            if not state.any():
                return None
            left = sum(providers[p].flops for p in members if p not in suffix)
            most = limit * left * (1 + 1e-9) if left else 0.0  # nobody is left, and no limit there yet
            return state if reach.flops[int(state.argmax())] <= most else None

        def search(suffix: tuple[int, ...], state: np.ndarray) -> Iterator[tuple[int, ...]]:
            whole = grown(suffix, state, None)
            if whole is not None and (whole[0] < self.so_far if latency else whole[0]):
                yield suffix
            for q in members if len(suffix) + 1 < len(reach.places) else ():
                if q not in suffix and (more := grown(suffix, state, q)) is not None:
                    yield from search((q, *suffix), more)

        start = np.where(reach.last(), 0.0, math.inf) if latency else reach.last()
        for p in members:
            yield from search((p,), start)


def neighbours(order: tuple[int, ...], members: Sequence[int]) -> Iterator[tuple[int, ...]]:
    """Each other than `order`, the nearest first."""
    count, out = len(order), [p for p in members if p not in order]
    for at, p in itertools.product(range(count), out):
        yield (*order[:at], p, *order[at + 1 :])
    for at, p in itertools.product(range(count + 1), out):
        yield (*order[:at], p, *order[at:])
    if count > 1:
        for at in range(count):
            yield (*order[:at], *order[at + 1 :])
    for at, to in itertools.combinations(range(count), 2):
        swapped = list(order)
        swapped[at], swapped[to] = swapped[to], swapped[at]
        yield tuple(swapped)
        if to > at + 1:
            yield (*order[:at], *reversed(order[at : to + 1]), *order[to + 1 :])
            yield (*order[:at], *order[at + 1 : to + 1], order[at], *order[to + 1 :])
            yield (*order[:at], order[to], *order[at:to], *order[to + 1 :])
