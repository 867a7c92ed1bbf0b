"""Hundreds of providers and more as replicas of a pipeline: those that are alike, dealt out like cards.

Providers of one region, or behind lines of one kind, are a bucket. They are dealt out to so many groups, the largest
first, so that all groups of a bucket are nearly the same; each begins with its largest, as 1F1B asks for, or goes from
region to region where lines between these are thin. One group then tells how fast the others are: how many there
should be is tried on it alone, for each bucket by itself. Only in the end all groups are walked.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

from llmsys.decentral import regions
from llmsys.decentral.cost import Costs
from llmsys.decentral.fleet import GIB, Provider
from llmsys.decentral.order import Pipeline
from llmsys.decentral.walk import Walk

ROUNDS, PARTS, STEPS = 3, 8, 6
"""In which numbers of groups follow the length of a step; of the largest number that are tried first; of bisections."""
CLOSE = (0.94, 1.02)
"""Of the slowest stage of a bucket's smallest group: where those of the others are looked for."""
Alike = Callable[[Provider], object]


def everything(provider: Provider) -> object:
    """In one bucket."""
    return None


def _line(provider: Provider) -> int:
    """By powers of two."""
    return round(math.log2(min(provider.up_mbit, provider.down_mbit)))


ALIKE: dict[str, Alike] = {
    "region": lambda provider: provider.region,
    "line": _line,
    "region and line": lambda provider: (provider.region, _line(provider)),
}
"""What those of a bucket have in common."""


@dataclass(kw_only=True)
class Bucket:
    """`members`, the largest first. `place`: by member, of its region in a pipeline; none where that does not matter.
    `most`: groups that there is memory for. `tried`: number of groups -> (the slowest stage, seconds of a micro-batch
    alone) of the smallest group; infinite where it cannot hold the chain."""

    members: list[int]
    place: dict[int, int]
    most: int
    tried: dict[int, tuple[float, float]] = field(default_factory=dict)

    def groups(self, count: int) -> list[list[int]]:
        """There and back, so that none has always the larger ones."""
        found: list[list[int]] = [[] for _ in range(count)]
        for at, p in enumerate(self.members):
            turn, place = divmod(at, count)
            found[place if turn % 2 == 0 else count - 1 - place].append(p)
        return [sorted(group, key=self.place.__getitem__) for group in found] if self.place else found


class Deal:
    """Of the providers of `costs`."""

    def __init__(self, costs: Costs, walk: Walk) -> None:
        self.costs, self.walk = costs, walk

    def buckets(self, members: Sequence[int], alike: Alike) -> list[Bucket]:
        """Those that have too little memory for a pipeline are one together."""
        providers = self.costs.fleet.providers
        whole: dict[object, list[int]] = {}
        for p in sorted(members, key=lambda p: (-providers[p].mem_gib, -providers[p].flops)):
            whole.setdefault(alike(providers[p]), []).append(p)
        enough = [each for each in whole.values() if self._most(each) >= 1]
        held = {p for each in enough for p in each}
        rest = [p for p in members if p not in held]
        rest.sort(key=lambda p: (-providers[p].mem_gib, -providers[p].flops))
        enough += [rest] if rest and self._most(rest) >= 1 else []
        return [Bucket(members=each, place=self._places(each), most=self._most(each)) for each in enough]

    def counts(self, buckets: Sequence[Bucket]) -> list[int]:
        """Groups of each, so that together most is done in a step; 0 of one that can hold no pipeline."""
        horizon = math.inf
        for _ in range(ROUNDS):
            found = [self._count(each, horizon) for each in buckets]
            used = [(count, *each.tried[count]) for each, count in zip(buckets, found, strict=True) if count]
            if not used:
                break
            # that is when all end together: the sum of count x (horizon - alone) / seconds is all micro-batches
            rate = sum(count / seconds for count, seconds, _ in used)
            lost = sum(count / seconds * alone for count, seconds, alone in used)
            horizon = (self.costs.work.micro_batches + lost) / rate
        return found

    def pipelines(self, buckets: Sequence[Bucket], counts: Sequence[int]) -> list[Pipeline]:
        """Of all groups; without those that hold none."""
        found = []
        for bucket, count in zip(buckets, counts, strict=True):
            for group in bucket.groups(count) if count else ():
                if (one := self._walked(group, self._tried(bucket, count)[0])) is not None:
                    found.append(one)
        return found

    def _walked(self, group: Sequence[int], about: float) -> Pipeline | None:
        low, high = (about * share for share in CLOSE)
        found = self.walk.within(group, high) if high < math.inf else None
        if found is None:
            found = self.walk.best(group, steps=STEPS)
        else:
            found = self.walk.refined(group, found, low, STEPS)
        if found is None:
            return None
        order, cuts, _ = found
        return Pipeline(tuple(order), tuple(cuts), self.costs.slowest_s(order, cuts))

    def _count(self, bucket: Bucket, horizon: float) -> int:
        """The number of groups that do most in `horizon` seconds: of a few, and then from the best on by halves."""

        def done(count: int) -> float:
            seconds, alone = self._tried(bucket, count)
            return count / seconds if horizon == math.inf else count * max(0.0, (horizon - alone) / seconds)

        best = worse = 0
        for part in range(PARTS, 0, -1):  # the smallest groups first, which are walked soonest
            count = max(1, round(bucket.most * part / PARTS))
            better = not best or done(count) > done(best)
            best, worse = (count, 0) if better else (best, worse + (done(best) > 0))
            if worse == 2:
                break
        step = max(1, bucket.most // (2 * PARTS))
        while step:
            near = [n for n in (best - step, best + step) if 1 <= n <= bucket.most]
            better_one = max([best, *near], key=done)
            step = step if better_one != best else step // 2
            best = better_one
        return best if done(best) > 0 else 0

    def _tried(self, bucket: Bucket, count: int) -> tuple[float, float]:
        if count not in bucket.tried:
            found = self.walk.best(min(bucket.groups(count), key=len), steps=STEPS)
            alone = math.inf if found is None else self.costs.latency_s(found[0], found[1])
            bucket.tried[count] = (math.inf if found is None else found[2], alone)
        return bucket.tried[count]

    def _most(self, members: Sequence[int]) -> int:
        providers = self.costs.fleet.providers
        return min(len(members), int(sum(providers[p].mem_gib for p in members) * GIB / self.costs.least_bytes))

    def _places(self, members: Sequence[int]) -> dict[int, int]:
        fleet = self.costs.fleet
        names = regions.row(fleet, {fleet.providers[p].region for p in members})
        thinnest = min(fleet.between_regions(a, b).mbit for a in names for b in names)
        if thinnest >= max(min(fleet.providers[p].up_mbit, fleet.providers[p].down_mbit) for p in members):
            return {}
        place = {name: at for at, name in enumerate(names)}
        return {p: place[fleet.providers[p].region] for p in members}
