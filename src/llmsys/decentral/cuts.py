"""The best cuts of a pipeline whose providers and their order are given: exact.

For the slowest stage, by bisection over its time T. Whether stages k, k+1, ... can run all from position i on, each
within T, is a set of positions; that of stage k follows from that of k+1 (`Reach.step`), since a stage that begins at i
may end anywhere up to where its time or its memory ends, at a position whose messages are short enough. What crosses a
cut has few different sizes, so that positions go by classes. Each T that suffices is lowered to the slowest stage of
the cuts it led to, so the search ends at a time that some cuts have, when none below it by more than `CLOSE` has any.

For the sum, by dynamic programming over (stage, position).
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from llmsys.decentral.chain import Numbers
from llmsys.decentral.cost import Costs
from llmsys.decentral.fleet import GIB

CLOSE = 1e-11
"""Of a time, as a share, what no better one is looked for in."""
Places = NDArray[np.int64]
Flags = NDArray[np.bool_]


class Cut(NamedTuple):
    """`cuts`: positions, both ends among them; `seconds`: what was minimised."""

    cuts: tuple[int, ...]
    seconds: float


class Reach:
    """What the search needs of `costs`, at the positions where the chain may be cut (n of them)."""

    def __init__(self, costs: Costs) -> None:
        self.costs = costs
        self.places: Places = costs.chain.places
        self.ahead, self.back = costs.ahead[self.places], costs.back[self.places]
        self.flops = costs.flops[self.places]
        pairs = np.stack([self.ahead, self.back], axis=1)
        classes, self.of = np.unique(pairs, axis=0, return_inverse=True)
        self.class_ahead, self.class_back = classes[:, 0], classes[:, 1]
        self.member: Flags = self.of.reshape(-1)[None, :] == np.arange(len(classes))[:, None]
        self.at = np.arange(len(self.places))
        self.held: dict[tuple[int, int, bool], Places | None] = {}
        self.timed: dict[int, Numbers] = {}

    def room(self, p: int, in_flight: int, offload: bool) -> Places | None:
        """Of each position, the last that a stage that begins there may end at, as memory and trust allow; None where
        p has no such way."""
        key = (p, in_flight, offload)
        if key not in self.held:
            self.held[key] = self._room(p, in_flight, offload)
        return self.held[key]

    def _room(self, p: int, in_flight: int, offload: bool) -> Places | None:
        costs, provider = self.costs, self.costs.fleet.providers[p]
        if offload and not (costs.work.offload and costs.work.train):
            return None
        sums = costs.memory(in_flight, offload)[self.places]
        free = provider.mem_gib * GIB - costs.chain.ahead[self.places] * in_flight
        ends = self._within(sums, free, costs.per_weight(offload))
        if offload:
            weights = costs.weights[self.places] * costs.work.optimizer
            host = np.full(len(free), provider.host_gib * GIB)
            ends = np.minimum(ends, self._within(weights, host, costs.work.optimizer))
        if not provider.trusted:
            private = costs.private[self.places]
            ends = np.minimum(ends, np.searchsorted(private, private, side="right") - 1)
        return ends

    def _within(self, sums: Numbers, free: Numbers, per_weight: float) -> Places:
        """As far as `sums` rises by `free` from each position. Of a tied parameter one reader counts in it less."""
        ends = np.searchsorted(sums, sums + free, side="right") - 1
        extra = np.zeros(len(free))
        for p, q, nbytes in sorted(self.costs.chain.ties, key=lambda tie: tie[1]):
            inside = self.places <= p
            extra = extra + inside * nbytes * per_weight
            more = np.searchsorted(sums, sums + free + extra, side="right") - 1
            ends = np.where(inside & (more >= 0) & (self.places[more] > q), np.maximum(more, ends), ends)
        return ends

    def ends(self, p: int, in_flight: int, limit: float) -> Places:
        """The same within `limit` seconds of computing as well."""
        room = self.rooms(p, in_flight)
        seconds = self.seconds(p)
        return np.minimum(room, np.searchsorted(seconds, seconds + limit, side="right") - 1)

    def rooms(self, p: int, in_flight: int) -> Places:
        """The further of both: with the optimizer on the device, and on the host."""
        plain, offloaded = (self.room(p, in_flight, offload) for offload in (False, True))
        assert plain is not None
        return plain if offloaded is None else np.maximum(plain, offloaded)

    def seconds(self, p: int) -> Numbers:
        """Computing on p, up to each position."""
        if p not in self.timed:
            self.timed[p] = self.flops / self.costs.fleet.providers[p].flops
        return self.timed[p]

    def step(
        self, after: Flags, limit: float, p: int, before: int | None, behind: int | None, stages_after: int
    ) -> Flags:
        """Positions from which p, between these two, can begin a stage that ends in `after`, within `limit`."""
        found: Flags = np.any(self._each(after, limit, p, before, behind, stages_after), axis=0)
        return found

    def _each(
        self, after: Flags, limit: float, p: int, before: int | None, behind: int | None, stages_after: int
    ) -> Flags:
        """The same by class of where it ends: (classes, n)."""
        costs = self.costs
        ends = self.ends(p, costs.work.in_flight(stages_after), limit)
        counts = np.cumsum(self.member & after, axis=1)
        found: Flags = (ends > self.at) & (counts[:, np.maximum(ends, 0)] > counts)
        sent = _times(self.class_ahead, costs.beta(p, behind))[:, None] + _times(self.back, costs.beta(p, before))
        came = _times(self.ahead, costs.beta(before, p)) + _times(self.class_back, costs.beta(behind, p))[:, None]
        return found & (sent <= limit) & (came <= limit) & np.isfinite(sent) & np.isfinite(came)

    def last(self) -> Flags:
        """The end alone."""
        flags = np.zeros(len(self.places), bool)
        flags[-1] = True
        return flags

    def within(self, order: Sequence[int], limit: float) -> tuple[int, ...] | None:
        """Cuts with which no stage takes longer than `limit`; None where there are none."""
        count = len(order)
        if count >= len(self.places):
            return None
        sets = [self.last()]
        for at in range(count - 1, -1, -1):
            sets.append(self.step(sets[-1], limit, *_around(order, at), count - 1 - at))
            if not sets[-1].any():
                return None
        if not sets[-1][0]:
            return None
        sets.reverse()
        cuts = [0]
        for at in range(count - 1):
            begin, ends = cuts[-1], sets[at + 1]
            stages_after = count - 1 - at
            classes = self._each(ends, limit, *_around(order, at), stages_after)[:, begin]
            furthest = int(self.ends(order[at], self.costs.work.in_flight(stages_after), limit)[begin])
            allowed = self.member[classes].any(axis=0) & ends & (self.at > begin) & (self.at <= furthest)
            cuts.append(int(np.flatnonzero(allowed)[-1]))
        return tuple(int(self.places[at]) for at in (*cuts, len(self.places) - 1))

    def throughput(self, order: Sequence[int], below: float = math.inf) -> Cut | None:
        """The cuts whose slowest stage is fastest; None where none is faster than `below`."""
        costs = self.costs
        limit = below if math.isinf(below) else below * (1 - CLOSE)
        cuts = self.within(order, limit)
        if cuts is None:
            return None
        best = Cut(cuts, costs.slowest_s(order, cuts))
        low = float(self.flops[-1]) / sum(costs.fleet.providers[p].flops for p in order) * (1 - 1e-9)
        while best.seconds - low > CLOSE * best.seconds:
            limit = (low + best.seconds) / 2
            cuts = self.within(order, limit)
            if cuts is None:
                low = limit
            else:
                best = Cut(cuts, min(best.seconds, costs.slowest_s(order, cuts), limit))
        return Cut(best.cuts, costs.slowest_s(order, best.cuts))

    def latency(self, order: Sequence[int], below: float = math.inf) -> Cut | None:
        """The cuts with which one micro-batch alone is through soonest; None likewise."""
        count = len(order)
        if count >= len(self.places):
            return None
        best = np.where(self.last(), 0.0, math.inf)
        chosen: list[Places] = []
        for at in range(count - 1, -1, -1):
            best, ends = self.sooner(best, *_around(order, at)[:2], count - 1 - at)
            chosen.append(ends)
        chosen.reverse()
        if not best[0] < below:
            return None
        cuts = [0]
        for ends in chosen:
            cuts.append(int(ends[cuts[-1]]))
        found = tuple(int(self.places[at]) for at in cuts)
        return Cut(found, self.costs.latency_s(order, found))

    def sooner(self, after: Numbers, p: int, before: int | None, stages_after: int) -> tuple[Numbers, Places]:
        """(seconds from each position to the end, with what comes over the line to p, where p's stage would end), of
        those from the end of that stage on."""
        total, ends = self._cheapest(p, self.costs.work.in_flight(stages_after), after)
        if before is None:
            return total, ends
        costs, fleet = self.costs, self.costs.fleet
        total = total + _times(self.ahead, costs.beta(before, p)) + fleet.alpha_s(before, p)
        if costs.work.train:
            total = total + _times(self.back, costs.beta(p, before)) + fleet.alpha_s(p, before)
        return total, ends

    def _cheapest(self, p: int, in_flight: int, after: Numbers) -> tuple[Numbers, Places]:
        """(seconds from each position to the end, where a stage on p that begins there ends)."""
        seconds = self.seconds(p)
        value, where = _least(after + seconds, self.at + 1, self.rooms(p, in_flight))
        return value - seconds, where


def _around(order: Sequence[int], at: int) -> tuple[int, int | None, int | None]:
    """(a provider, the one before it, the one behind it)."""
    return order[at], order[at - 1] if at else None, order[at + 1] if at + 1 < len(order) else None


def _least(values: Numbers, begin: Places, end: Places) -> tuple[Numbers, Places]:
    """(the least of `values[begin[i] : end[i] + 1]`, where it is) for each i, infinite where that is empty; by a table
    of the least of each 1, 2, 4, ... in a row."""
    tables = [np.arange(len(values))]
    while 2 ** len(tables) <= len(values):
        half, one = 2 ** (len(tables) - 1), tables[-1]
        left, right = one[:-half], one[half:]
        tables.append(np.where(values[left] <= values[right], left, right))
    found, where = np.full(len(begin), math.inf), np.zeros(len(begin), np.int64)
    sizes = end - begin + 1
    for level, table in enumerate(tables):
        asked = np.flatnonzero((sizes >= 2**level) & (sizes < 2 ** (level + 1)))
        left, right = table[begin[asked]], table[end[asked] - 2**level + 1]
        where[asked] = np.where(values[left] <= values[right], left, right)
        found[asked] = values[where[asked]]
    return found, where


def _times(nbytes: Numbers, beta: float) -> Numbers:
    if math.isinf(beta):
        return np.where(nbytes > 0, math.inf, 0.0)
    found: Numbers = nbytes * beta
    return found
