"""Ways to part a fleet into pipelines, to be compared by what a step of each comes to.

Up to six providers all of them. Of more, providers are put in a row, by lines, regions or speed, and the row is parted
into 1, 2, 3, ... groups, each of which gets the best pipeline that is found of it (`find`); of many they are dealt out
to groups as well (`deal`), and of thousands only that. Besides those that hold the chain by themselves, the pipeline
that a micro-batch is through soonest, and what others would do: the fastest slowest stage is not always the best step.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence

from llmsys.decentral import baselines
from llmsys.decentral.deal import ALIKE, Deal, everything
from llmsys.decentral.find import HURRIED, SEARCHED, Finder
from llmsys.decentral.fleet import GIB
from llmsys.decentral.order import ALL, Pipeline
from llmsys.decentral.parts import ROWS, counts, groups_of, partitions
from llmsys.decentral.score import score, share_of

MANY, THOUSANDS = 64, 1000
"""Providers of a fleet up to which groups are searched, and not walked alone; up to which they are put in rows."""
POLISHED, PATIENCE, FEWER = 2, 2, 0.7
"""How many of the ways to part a fleet are searched, if it is no large one; numbers of replicas, each larger than the
last, after which more are not tried where none was better; of what is dealt, each next."""
Way = tuple[float, list[list[int]], list[Pipeline]]
"""(micro-batches a second, groups of providers, pipelines of these)."""


class Ways:
    """Of the providers that `finder` finds pipelines of."""

    def __init__(self, finder: Finder) -> None:
        self.finder, self.costs, self.thorough = finder, finder.costs, finder.thorough

    def of(self, members: Sequence[int], replicas: int | None) -> Iterator[list[Pipeline]]:
        """None where there is too little memory."""
        if not members or self._memory(members) < 1:
            return
        yield from self._few(members) if self.thorough and len(members) <= ALL else self._many(members, replicas)

    def _few(self, members: Sequence[int]) -> Iterator[list[Pipeline]]:
        """Every way to part some of them; and what is through soonest, which a step of a few micro-batches is."""
        for parts in partitions(list(members)):
            pipelines = [self.finder.pipeline(part) for part in parts]
            if None not in pipelines:
                yield [each for each in pipelines if each is not None]
        if self.costs.work.train and (soon := self.finder.soonest(members)) is not None:
            yield [soon]
        yield from self._of_others()

    def _alone(self, members: Sequence[int]) -> Iterator[list[Pipeline]]:
        """Those that hold the chain by themselves: the fastest of them, and all."""
        cuts = (0, self.costs.chain.count)
        alone = [Pipeline((p,), cuts, self.costs.slowest_s((p,), cuts)) for p in members]
        alone = sorted((each for each in alone if each.seconds < math.inf), key=lambda each: each.seconds)
        yield from ([each] for each in alone[:1])
        if len(alone) > 1:
            yield from self._enough(alone)

    def _of_others(self) -> Iterator[list[Pipeline]]:
        """As others lay the chain out: what is best by its slowest stage need not be by a step."""
        yield from ([one] for make in baselines.PIPELINES.values() if (one := make(self.costs)) is not None)

    def _many(self, members: Sequence[int], replicas: int | None) -> Iterator[list[Pipeline]]:
        """All ways to group them walked, and the pipelines of the best of these searched."""
        most = max(1, min(len(members), int(self._memory(members))))
        numbers = [replicas] if replicas else counts(most)
        if len(members) <= THOUSANDS and numbers[0] == 1 and (one := self.finder.pipeline(members)) is not None:
            yield [one]
        if replicas in (None, len(members), 1):
            yield from self._alone(members)
        if replicas in (None, 1) and len(members) <= HURRIED:
            yield from self._of_others()
        if replicas in (None, 1) and self.thorough and len(members) <= SEARCHED and self.costs.work.train:
            yield from ([one] for one in [self.finder.soonest(members)] if one is not None)
        walked: list[Way] = []
        if len(members) <= THOUSANDS:
            walked += self._in_rows(members, [each for each in numbers if each > 1])
        if len(members) > MANY:
            walked += self._dealt(members, replicas)
        walked.sort(key=lambda each: each[0], reverse=True)
        yield from (some for *_, some in walked[:1])
        if len(members) <= MANY:
            for _, groups, some in walked[: POLISHED if len(members) <= HURRIED else 1]:
                yield [
                    self._polished(each, group) for each in some for group in groups if set(each.order) <= set(group)
                ]

    def _in_rows(self, members: Sequence[int], numbers: Sequence[int]) -> Iterator[Way]:
        """Stretches of rows."""
        for row in ROWS.values():
            order, best, worse = row(self.costs, members), 0.0, 0
            for count in numbers:
                groups = groups_of(self.costs, order, count)
                pipelines = [each for group in groups if (each := self.finder.along(group)) is not None]
                rates = [0.0]
                for some in self._enough(pipelines):
                    rates.append(score(self.costs, some).per_s)
                    yield rates[-1], groups, some
                best, worse = max(best, *rates), 0 if max(rates) > best else worse + 1
                if worse == PATIENCE:
                    break

    def _dealt(self, members: Sequence[int], replicas: int | None) -> Iterator[Way]:
        """Those that are alike: as many groups as would do most if gradients cost nothing, and fewer while that is
        better."""
        deal, seen = Deal(self.costs, self.finder.walk), []
        for alike in [everything] if replicas else ALIKE.values():
            buckets = deal.buckets(members, alike)
            if (parted := sorted(each.members for each in buckets)) in seen:
                continue
            seen.append(parted)
            most, share, best = [replicas] if replicas else deal.counts(buckets), 1.0, 0.0
            while True:
                number = [min(count, max(1, round(count * share))) for count in most]
                pipelines, rates = deal.pipelines(buckets, number), [0.0]
                for some in self._enough(pipelines):
                    rates.append(score(self.costs, some).per_s)
                    yield rates[-1], [], some
                share *= FEWER
                if replicas or max(rates) <= best:
                    break
                best = max(rates)

    def _polished(self, found: Pipeline, group: Sequence[int]) -> Pipeline:
        """The better of a walked pipeline and one that is searched of the same providers."""
        other = self.finder.pipeline(group)
        return other if other is not None and other.seconds < found.seconds else found

    def _enough(self, pipelines: list[Pipeline]) -> Iterator[list[Pipeline]]:
        if pipelines:
            yield pipelines
        if self.costs.work.train and len(pipelines) > 2:
            yield from self._without_slow(pipelines)

    def _memory(self, members: Sequence[int]) -> float:
        """How often the chain goes into theirs, with one micro-batch on its way, and no cut in an operator."""
        return sum(self.costs.fleet.providers[p].mem_gib for p in members) * GIB / self.costs.least_bytes

    def _without_slow(self, pipelines: Sequence[Pipeline]) -> Iterator[list[Pipeline]]:
        """Without those whose lines hold all others up when gradients are added: of all beginnings, by estimate the
        best."""
        costs = self.costs
        waits = share_of(costs, pipelines)
        order = sorted(range(len(pipelines)), key=waits.__getitem__)
        best, rate = (math.inf, 0), 0.0
        for kept, at in enumerate(order, start=1):
            rate += 1 / pipelines[at].seconds
            best = min(best, (costs.work.micro_batches / rate + waits[at], kept))
        if best[1] < len(order):
            yield [pipelines[at] for at in order[: best[1]]]
