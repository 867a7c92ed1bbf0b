"""What a set of pipelines comes to: the time of a step, how micro-batches are shared out, what it is to agree.

Replicas of the pipeline train on micro-batches of their own and add up their gradients at the end of a step: each stage
with the providers that hold the same operators in the next pipeline, round a ring or up and down a tree, whichever is
faster (`cost.links`); or first within each region, where every replica gets a piece, and then each piece between
regions. How long a pipeline takes for its share is `pace`'s.
"""

from __future__ import annotations

import heapq
import itertools
import math
from bisect import bisect_right
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from llmsys.cost.links import Line
from llmsys.decentral.cost import Costs
from llmsys.decentral.order import Pipeline
from llmsys.decentral.pace import pace
from llmsys.decentral.regions import ring


@dataclass(frozen=True, kw_only=True)
class Score:
    """`shares`: micro-batches of a step by pipeline. `step_s`, of which `sync_s` the replicas add up gradients; without
    training the time of so many micro-batches in full pipelines."""

    shares: tuple[int, ...]
    step_s: float
    sync_s: float

    @property
    def per_s(self) -> float:
        """Micro-batches a second."""
        return sum(self.shares) / self.step_s


def score(costs: Costs, pipelines: Sequence[Pipeline]) -> Score:
    """Of pipelines whose `seconds` are their slowest stages. A pipeline that would only delay a step has a share of 0,
    and none where GPipe's memory was planned for equal shares."""
    work = costs.work
    slowest = [each.seconds for each in pipelines]
    if not work.train:
        rate = sum(1 / each for each in slowest)
        counts = np.floor(work.micro_batches / np.array(slowest) / rate).astype(int)
        counts[: work.micro_batches - int(counts.sum())] += 1
        return Score(shares=tuple(counts.tolist()), step_s=work.micro_batches / rate, sync_s=0.0)
    paces = [pace(costs, each.order, each.cuts) for each in pipelines]
    if not all(math.isfinite(each.step_s(1)) for each in paces):
        return Score(shares=(work.micro_batches, *[0] * (len(paces) - 1)), step_s=math.inf, sync_s=0.0)
    alone, period = [each.alone_s + each.once_s for each in paces], [each.period_s for each in paces]
    shares = _shares(alone, period, work.micro_batches, equal=work.schedule == "gpipe")
    used = [at for at, share in enumerate(shares) if share]
    steps = [paces[at].step_s(shares[at]) for at in used]
    sync = sync_s(costs, [pipelines[at] for at in used])
    return Score(shares=tuple(shares), step_s=max(steps) + sync, sync_s=sync)


def _shares(alone: Sequence[float], slowest: Sequence[float], total: int, equal: bool) -> list[int]:
    """Whole numbers that end the last pipeline soonest."""
    count = len(alone)
    if equal:
        return [total // count + (at < total % count) for at in range(count)]
    low, high = 0.0, max(alone) + total * max(slowest)
    first, each = np.array(alone), np.array(slowest)
    for _ in range(60):
        limit = (low + high) / 2
        if np.maximum(np.floor((limit - first) / each) + 1, 0).sum() >= total:
            high = limit
        else:
            low = limit
    shares = np.maximum(np.floor((low - first) / each) + 1, 0).astype(int)
    left = [(first[at] + shares[at] * each[at], at) for at in range(count)]
    heapq.heapify(left)
    for _ in range(total - int(shares.sum())):
        ends, at = heapq.heappop(left)
        shares[at] += 1
        heapq.heappush(left, (ends + each[at], at))
    return [int(share) for share in shares]


def sync_s(costs: Costs, pipelines: Sequence[Pipeline]) -> float:
    """Seconds until all replicas have the sum of their gradients, of the provider that takes longest: in one ring or
    tree, or first those of each region a piece each, then each piece between regions, whichever is faster."""
    if len(pipelines) < 2 or not costs.work.train:
        return 0.0
    regions: dict[str, list[Pipeline]] = {}
    for each in pipelines:
        regions.setdefault(_home(costs, each), []).append(each)
    known, key = costs.known.rings, frozenset(regions)
    if key not in known:
        known[key] = ring(costs.fleet, regions)
    groups = [regions[name] for name in known[key]]
    whole = _summed(costs, [one for group in groups for one in group])
    if len(groups) in (1, len(pipelines)):
        return whole
    within = max(_summed(costs, group) for group in groups)
    return min(whole, within + _between(costs, groups))


def _home(costs: Costs, own: Pipeline) -> str:
    """The region of most of its providers."""
    return Counter(costs.fleet.providers[p].region for p in own.order).most_common(1)[0][0]


def _summed(costs: Costs, pipelines: Sequence[Pipeline]) -> float:
    """All-reduce of these, each with the next."""
    count = len(pipelines)
    found = [_neighbours(costs, own, pipelines[(at + 1) % count]) for at, own in enumerate(pipelines)]
    return _all_reduce(found, count)


def _between(costs: Costs, groups: Sequence[Sequence[Pipeline]]) -> float:
    """All-reduce of the groups, whose members have a piece each: of two groups the smaller one's pieces are larger."""
    found = []
    for at, own in enumerate(groups):
        then = groups[(at + 1) % len(groups)]
        pieces, pairs = min(len(own), len(then)), max(len(own), len(then))
        for k in range(pairs):
            seconds, alpha = _neighbours(costs, own[k * len(own) // pairs], then[k * len(then) // pairs])
            found.append((seconds / pieces, alpha))
    return _all_reduce(found, len(groups))


def _all_reduce(found: Sequence[tuple[float, float]], count: int) -> float:
    longest, alpha = (max(each[k] for each in found) for k in (0, 1))
    return Line(alpha, 1.0).best("all_reduce", longest, count)[0]


def _neighbours(costs: Costs, own: Pipeline, then: Pipeline) -> tuple[float, float]:
    """(seconds that the busiest line is busy for when `own` sends all of its gradients to `then` once, the longest
    latency between them)."""
    key = ((own.order, own.cuts), (then.order, then.cuts))
    if key in costs.known.sums:
        return costs.known.sums[key]
    sent: dict[int, float] = {}
    came: dict[int, float] = {}
    alpha = 0.0
    for p, (begin, end) in zip(own.order, itertools.pairwise(own.cuts), strict=True):
        place = bisect_right(then.cuts, begin) - 1
        while place < len(then.order) and then.cuts[place] < end:
            q = then.order[place]
            low, high = max(begin, then.cuts[place]), min(end, then.cuts[place + 1])
            nbytes = float(costs.weights[high] - costs.weights[low]) * costs.work.gradient
            seconds = nbytes * costs.line(p, q)
            sent[p] = sent.get(p, 0.0) + seconds
            came[q] = came.get(q, 0.0) + seconds
            alpha = max(alpha, costs.fleet.alpha_s(p, q))
            place += 1
    costs.known.sums[key] = (max(*sent.values(), *came.values()), alpha)
    return costs.known.sums[key]


def share_of(costs: Costs, pipelines: Sequence[Pipeline]) -> list[float]:
    """Of each pipeline, the least seconds that adding up takes with others: its own lines', whoever is next."""
    found = []
    for each in pipelines:
        worst = 0.0
        for p, begin, end in zip(each.order, each.cuts, each.cuts[1:], strict=False):
            provider = costs.fleet.providers[p]
            nbytes = float(costs.weights[end] - costs.weights[begin]) * costs.work.gradient
            worst = max(worst, 2 * nbytes * 8e-6 / min(provider.up_mbit, provider.down_mbit))
        found.append(worst)
    return found
