"""Many small cards against a few large ones: above which link, with what latency, and whether they hold the model.

FusionAI (arXiv 2309.01172) says in its abstract that 50 RTX 3080 reach the throughput of 4 H100. Its analysis was not
available; this is another one, by two models:

    closed     n equal stages, each of work W / n, and the same message over each cut: a stage takes
               t = W / (n efficiency peak), and a line of B bits a second keeps up with it where B >= 8 bytes / t
    planned    the cuts that `cuts` finds, at operators, with the bytes that cross each: some stage is longer than W / n

`critical_mbit` is the rate above which lines do not matter. Times go with 1 / efficiency and messages do not, so the
critical rate is proportional to the efficiency of the small cards.
"""

from __future__ import annotations

import dataclasses
import math
from dataclasses import dataclass

from llmsys.decentral.chain import Chain
from llmsys.decentral.cost import Costs, Workload
from llmsys.decentral.cuts import Cut, Reach
from llmsys.decentral.fleet import GIB, Between, Fleet, Provider

SAME = 1e-3
"""By how much, as a share, a pipeline may be slower than without lines, and lines are said not to matter."""
FAST_MBIT = 1e12
"""A line that nothing waits for."""


def closed_critical_mbit(work: float, nbytes: float, count: int, flops: float) -> float:
    """Of `count` equal stages with `work` FLOPs altogether, on `flops` a second each, and `nbytes` over each cut."""
    return 8e-6 * nbytes / (work / count / flops)


@dataclass(frozen=True)
class Cards:
    """`count` equal machines in a row, each on a line of `mbit` both ways, with `delay_ms` one way."""

    chain: Chain
    work: Workload
    card: Provider
    count: int
    mbit: float = FAST_MBIT
    delay_ms: float = 0.0

    def at(self, mbit: float, delay_ms: float = 0.0) -> Cards:
        return dataclasses.replace(self, mbit=mbit, delay_ms=delay_ms)

    def unlimited(self) -> Cards:
        """As if memory were no limit."""
        return dataclasses.replace(self, card=dataclasses.replace(self.card, mem_gib=1e9))

    @property
    def costs(self) -> Costs:
        machines = tuple(
            dataclasses.replace(self.card, name=f"{self.card.name}-{at}", up_mbit=self.mbit, down_mbit=self.mbit)
            for at in range(self.count)
        )
        return Costs(self.chain, Fleet(providers=machines, other=Between(delay_ms=self.delay_ms)), self.work)

    def pipeline(self) -> Cut | None:
        """All of them as one, cut so that its slowest stage is fastest; None where they do not hold the model."""
        return Reach(self.costs).throughput(range(self.count))

    def latency_s(self, cuts: tuple[int, ...]) -> float:
        """One micro-batch alone."""
        return self.costs.latency_s(range(self.count), cuts)

    def critical_mbit(self) -> float:
        """The rate of a line from which on the pipeline is as fast as with none. ValueError without a pipeline."""
        best = self.at(FAST_MBIT).pipeline()
        if best is None:
            raise ValueError(f"{self.count} x {self.card.name}: do not hold the model")
        return self.rate_for(best.seconds * (1 + SAME))

    def rate_for(self, limit: float) -> float:
        """The rate of a line (Mbit/s) from which on no stage takes longer than `limit` seconds; infinite where on no
        line."""
        order, high = range(self.count), FAST_MBIT
        if Reach(self.at(FAST_MBIT).costs).within(order, limit) is None:
            return math.inf
        if Reach(self.at(1e-6).costs).within(order, limit) is not None:
            return 0.0
        low = 1e-6
        while high > low * (1 + 1e-5):
            middle = math.sqrt(low * high)
            if Reach(self.at(middle).costs).within(order, limit) is None:
                low = middle
            else:
                high = middle
        return high

    def memory(self) -> Memory:
        """What each card has, and what it needs."""
        has = self.card.mem_gib
        weights = self.chain.weight_bytes / GIB
        least = self.costs.device_bytes(0, self.chain.count, 1) / GIB
        found = self.pipeline()
        needs = None
        if found is not None:
            stages = self.costs.stages(range(self.count), found.cuts)
            assert stages is not None
            needs = max(each.device_bytes for each in stages) / GIB
        return Memory(has_gib=has * self.count, weights_gib=weights, needs_gib=least, fullest_gib=needs)


@dataclass(frozen=True, kw_only=True)
class Memory:
    """Of all cards together: what they have, weights alone, and what the workload needs with one micro-batch on its
    way. `fullest_gib`: of the card that has most to hold; None where they do not hold the model."""

    has_gib: float
    weights_gib: float
    needs_gib: float
    fullest_gib: float | None

    @property
    def holds(self) -> bool:
        return self.fullest_gib is not None


@dataclass(frozen=True, kw_only=True)
class Comparison:
    """Throughputs in micro-batches a second, of full pipelines, as if memory were no limit where it is one (the two
    `Memory`s say so). `parity_mbit`: the rate at which they are as fast; infinite where on no line. `best_parity_mbit`:
    the same where the small cards reach `best` times as large a share of their peaks. `closed_mbit` of equal stages
    with the chain's work and its least message; `uneven`: the longest stage over the mean."""

    small: Memory
    large: Memory
    small_per_s: float
    large_per_s: float
    uneven: float
    critical_mbit: float
    closed_mbit: float
    small_latency_s: float
    large_latency_s: float
    parity_mbit: float
    best_parity_mbit: float

    @property
    def ratio(self) -> float:
        """Small over large, on lines that nothing waits for."""
        return self.small_per_s / self.large_per_s


def compare(small: Cards, large: Cards, mbit: float, delay_ms: float, best: float = 1.0) -> Comparison:
    """`best`: as in `Comparison`. Latencies on lines of `mbit` and `delay_ms` between the small cards; the large ones'
    are as they are given."""
    free, few = small.unlimited(), large.unlimited()
    fast, other = free.at(FAST_MBIT).pipeline(), few.pipeline()
    slow = free.at(mbit, delay_ms)
    there = slow.pipeline()
    if fast is None or other is None or there is None:
        raise ValueError(f"the model has fewer than {max(small.count, large.count)} operators to cut between")
    mean = float(free.costs.flops[-1]) / small.count / small.card.flops
    inner = _body(free.costs)
    sent = free.costs.ahead[inner] + free.costs.back[inner]
    return Comparison(
        small=small.memory(),
        large=large.memory(),
        small_per_s=1 / fast.seconds,
        large_per_s=1 / other.seconds,
        uneven=fast.seconds / mean,
        critical_mbit=free.critical_mbit(),
        closed_mbit=closed_critical_mbit(float(free.costs.flops[-1]), float(sent.min()), small.count, small.card.flops),
        small_latency_s=slow.latency_s(there.cuts),
        large_latency_s=few.latency_s(other.cuts),
        parity_mbit=free.rate_for(other.seconds * (1 + SAME)),
        best_parity_mbit=free.rate_for(other.seconds * best * (1 + SAME)),
    )


def _body(costs: Costs) -> list[int]:
    """Positions between a tenth and nine tenths of the work: before and behind, embeddings and the loss send little."""
    done = costs.flops / costs.flops[-1]
    return [at for at in costs.chain.places.tolist() if 0.1 <= done[at] <= 0.9]
