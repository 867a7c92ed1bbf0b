"""Cuts of a given order, fast: each stage as long as its time and its memory allow, one after another.

Within a time T for the slowest stage a provider takes all operators that it can, back to the last position whose
messages are short enough. That is not always the best (`cuts` is), but a fleet of thousands is gone through in
milliseconds. Providers whose lines are too slow for T at any cut are passed over.
"""

from __future__ import annotations

import math
from bisect import bisect_right
from collections.abc import Callable, Iterator, Sequence

import numpy as np

from llmsys.decentral.cost import Costs
from llmsys.decentral.fleet import GIB
from llmsys.decentral.order import neighbours

STEPS, NEAR = 12, 1.001
"""Of the bisection, at most; and over the lower bound what is near enough."""


LESS, TRIES = 0.999, 2400
"""What an order has to save, as a share of the slowest stage; how many stages a local search walks, at most."""
Walked = tuple[list[int], list[int], float]
"""(providers, cuts, the slowest stage)."""
Better = Callable[[Sequence[int], Walked], Walked | None]
"""Of an order, and what is the best so far: something better."""


class Walk:
    """`costs` as plain lists, which are read faster one by one."""

    def __init__(self, costs: Costs) -> None:
        self.costs = costs
        self.speed = [each.flops for each in costs.fleet.providers]
        self.bytes = [each.mem_gib * GIB for each in costs.fleet.providers]
        self.in_flight = [costs.work.in_flight(stages) for stages in range(len(costs.fleet))]
        places = costs.chain.places
        self.places: list[int] = places.tolist()
        self.flops: list[float] = costs.flops[places].tolist()
        self.ahead: list[float] = costs.ahead[places].tolist()
        self.received: list[float] = costs.chain.ahead[places].tolist()
        self.back: list[float] = costs.back[places].tolist()
        self.private: list[float] = costs.private[places].tolist()
        inner = slice(1, -1)
        self.least_ahead = min(self.ahead[inner], default=0.0)
        self.least_back = min(self.back[inner], default=0.0)
        self.memory: dict[tuple[int, bool], list[float]] = {}
        self.lines: dict[tuple[int, int], tuple[float, float]] = {}
        self.weights: list[float] = costs.weights[places].tolist()
        # a stage has both readers that begins at or before the first one's operator, and ends behind the second's
        self.ties = [
            (
                int(np.searchsorted(places, p, side="right")) - 1,
                int(np.searchsorted(places, q, side="right")) - 1,
                nbytes,
            )
            for p, q, nbytes in sorted(costs.chain.ties, key=lambda tie: tie[1])
        ]

    def best(self, order: Sequence[int], below: float = math.inf, steps: int = STEPS) -> Walked | None:
        """Of those of `order`, in order, in less than `below`; None where there is no way. In `steps` of bisection."""
        if not order:
            return None
        low = self.flops[-1] / sum(self.speed[p] for p in order)
        limits = (min(low * 2, below), *(each for each in self._by_lines(order) if 2 * low < each < below), below)
        found = next((found for limit in limits if (found := self.within(order, limit)) is not None), None)
        if found is None:
            return None
        order, cuts, _ = self.refined(order, found, low, steps)
        seconds = self.costs.slowest_s(order, cuts)
        return (order, cuts, seconds) if seconds < below else None

    def improved(self, found: Walked, members: Sequence[int], tries: int = TRIES) -> Walked:
        """By local search: neighbouring orders, each tried at a little less than the slowest stage has; at most `tries`
        stages are walked."""

        def faster(order: Sequence[int], now: Walked) -> Walked | None:
            better = self.within(order, now[2] * LESS)
            return None if better is None else self.refined(order, better, now[2] / 2, STEPS)

        return self._locally(found, members, faster, tries)

    def sooner(self, found: Walked, members: Sequence[int]) -> Walked:
        """As fast, and a micro-batch is through sooner, which a step waits for once: by local search likewise."""

        def nearer(order: Sequence[int], now: Walked) -> Walked | None:
            other = self.within(order, now[2])
            if other is None:
                return None
            after, before = (self.costs.latency_s(each[0], each[1]) for each in (other, now))
            return other if after < before * LESS else None

        return self._locally(found, members, nearer, TRIES // 2)

    def _locally(self, found: Walked, members: Sequence[int], better: Better, tries: int) -> Walked:
        """The first better of the neighbours, and again, while there is one and `tries` stages are not walked."""
        while tries > 0:
            for order in neighbours(tuple(found[0]), members):
                tries -= len(order)
                other = better(order, found)
                found = other or found
                if other is not None or tries < 0:
                    break
            else:
                break
        return found[0], found[1], self.costs.slowest_s(found[0], found[1])

    def within(self, order: Sequence[int], limit: float) -> Walked | None:
        """With no stage over `limit`, of those of `order`, in order; the first that suffice. One that can have no stage
        between its neighbours is passed over, and the stage before it is cut for the next."""
        left = [p for p in order if self._passes(p, limit)] if len(order) > 1 else list(order)
        ahead, back, last = self.ahead, self.back, len(self.places) - 1
        # of each stage so far: where it begins, seconds of the line there in this direction and back, the slowest yet
        begun, at = [(0, 0.0, 0.0, 0.0)], 0
        while at < len(left):
            p, (begin, came, went, slowest) = left[at], begun[at]
            reached = self._furthest(p, begin, len(left) - 1 - at, limit)
            if reached >= last:
                slowest = max(slowest, self._seconds(p, begin, last))
                cuts = [*(self.places[begin] for begin, *_ in begun), self.places[last]]
                return left[: at + 1], cuts, slowest
            if at + 1 == len(left):
                return None
            q = left[at + 1]
            end, (out, home) = reached, self._line(p, q)
            later = self._later(left, at + 1, end, limit)
            most_out, most_home = limit - max(went, later[0]), limit - max(came, later[1])
            if self.least_ahead * out > most_out or self.least_back * home > most_home:
                end = begin
            while end > begin and (ahead[end] * out > most_out or back[end] * home > most_home):
                end -= 1
            if end > begin:
                sent, brought = ahead[end] * out, back[end] * home
                seconds = self._seconds(p, begin, end)
                begun.append((end, sent, brought, max(slowest, seconds, sent + went, brought + came)))
                at += 1
                continue
            gone = at if reached <= begin else self._slower(left, at)
            del left[gone]
            if gone == at and at > 0:
                begun.pop()
                at -= 1
        return None

    def _later(self, left: Sequence[int], at: int, begin: int, limit: float) -> tuple[float, float]:
        """The least seconds that the next stage, from about `begin` on, will receive from the one behind it, and send
        to it: none where it may be the last."""
        p = left[at]
        mine = limit * self.speed[p] >= self.flops[-1] - self.flops[begin]
        if at + 1 == len(left) or mine:
            return 0.0, 0.0
        out, home = self._line(p, left[at + 1])
        return self.least_back * home, self.least_ahead * out

    def _line(self, p: int, q: int) -> tuple[float, float]:
        """Seconds a byte, from p to q and back."""
        found = self.lines.get((p, q))
        if found is None:
            found = self.lines[p, q] = (self.costs.beta(p, q), self.costs.beta(q, p))
        return found

    def refined(self, order: Sequence[int], best: Walked, low: float, steps: int) -> Walked:
        """Between `low`, below which nothing is, and what was found."""
        for _ in range(steps):
            if best[2] <= low * NEAR:
                break
            limit = (low + best[2]) / 2
            found = self.within(order, limit)
            if found is None:
                low = limit
            else:
                best = found
        return best

    def _by_lines(self, order: Sequence[int]) -> Iterator[float]:
        """Seconds in which a quarter, a half, ... of these send and receive the least that crosses a cut both ways. A
        longer time does not always do better: messages may be longer in it, and have to be kept."""
        providers = [self.costs.fleet.providers[p] for p in order]
        slowest = sorted((min(each.up_mbit, each.down_mbit) for each in providers), reverse=True)
        for share in (0.25, 0.5, 0.75, 1.0):
            yield (self.least_ahead + self.least_back) * 8e-6 / slowest[math.ceil(share * len(slowest)) - 1] * NEAR

    def _passes(self, p: int, limit: float) -> bool:
        """Whether p's lines are fast enough for the first stage or for the last, which have one neighbour."""
        provider, least = self.costs.fleet.providers[p], 8e-6 / limit
        ahead, back = self.least_ahead * least, self.least_back * least
        first = ahead <= provider.up_mbit and back <= provider.down_mbit
        return first or (back <= provider.up_mbit and ahead <= provider.down_mbit)

    def _seconds(self, p: int, begin: int, end: int) -> float:
        return (self.flops[end] - self.flops[begin]) / self.speed[p]

    def _slower(self, order: Sequence[int], at: int) -> int:
        """Of two neighbours, the place of the one with the slower lines."""
        one, other = (self.costs.fleet.providers[p] for p in order[at : at + 2])
        return at + (min(other.up_mbit, other.down_mbit) < min(one.up_mbit, one.down_mbit))

    def _furthest(self, p: int, begin: int, stages_after: int, limit: float) -> int:
        """Where p's stage may end, as far as computing, memory and trust go."""
        costs, provider, in_flight = self.costs, self.costs.fleet.providers[p], self.in_flight[stages_after]
        reached = bisect_right(self.flops, self.flops[begin] + limit * self.speed[p], begin) - 1
        end = min(reached, self._room(p, begin, in_flight, False))
        if costs.work.offload and costs.work.train and end < reached:
            host = self.weights[begin] + provider.host_gib * GIB / max(costs.work.optimizer, 1e-9)
            held = bisect_right(self.weights, host, begin) - 1
            end = max(end, min(reached, held, self._room(p, begin, in_flight, True)))
        if not provider.trusted:
            end = min(end, bisect_right(self.private, self.private[begin], begin) - 1)
        return end

    def _room(self, p: int, begin: int, in_flight: int, offload: bool) -> int:
        key = (in_flight, offload)
        if key not in self.memory:
            self.memory[key] = self.costs.memory(in_flight, offload)[self.costs.chain.places].tolist()
        sums = self.memory[key]
        most = sums[begin] + self.bytes[p] - self.received[begin] * in_flight
        end = bisect_right(sums, most, begin) - 1
        for first, second, nbytes in self.ties:
            if begin <= first:
                most += nbytes * self.costs.per_weight(offload)
                more = bisect_right(sums, most, begin) - 1
                end = more if more > second else end
        return end
