"""What a stage costs a provider: the time of its device and of its two lines, and its memory.

Of stage [i, j) of a chain on provider p, between `before` and `after`, in a micro-batch:

    compute   passes x (work of the stage) / (efficiency x peak)
    send      ahead[j] beta(p, after) + back[i] beta(p, before)      one line out: one message at a time
    receive   ahead[i] beta(before, p) + back[j] beta(after, p)      one line in
    slowest   the largest of the three: what a full pipeline waits for

`passes` is 1 for inference, 3 for training (a backward pass is twice a forward one) and 4 with recomputation. Memory is
weights, gradients and optimizer state, and what each of the micro-batches that are on their way keeps: what operators
save for the backward pass and what was received, or with recomputation that of one micro-batch and what was received.
How many are on their way is the schedule's: all in GPipe; in 1F1B as many as there are stages from here to the end; in
eager 1F1B one more for each line between these (Zhuang et al., arXiv 2211.05322), so that lines are busy meanwhile.
"""

from __future__ import annotations

import functools
import itertools
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from llmsys.decentral.chain import Chain, Numbers
from llmsys.decentral.compression import ADAPTIVE, NONE, over, strongest
from llmsys.decentral.fleet import GIB, Fleet, Provider
from llmsys.decentral.known import Known
from llmsys.schema.decentral import SCHEDULES
from llmsys.schema.together import COMPRESS

HOST_BYTES_PER_S = 20e9
"""Of an optimizer's state on a host of the kind that has a consumer GPU: two channels of DDR4, half of their peak."""


def in_flight(schedule: str, stages_after: int, micro_batches: int) -> int:
    """Of a schedule of training: micro-batches that a stage keeps, with so many behind it."""
    if schedule == "gpipe":
        return micro_batches
    return min(micro_batches, stages_after * (2 if schedule == "eager_1f1b" else 1) + 1)


@dataclass(frozen=True, kw_only=True)
class Workload:
    """`micro_batches` of a step, over all replicas; GPipe as `schedule` has room for all of them in each. `gradient`,
    `optimizer`: bytes of these for a byte of weights (fp32 and AdamW: 1 and 2; bf16 with fp32 master weights: 1 and 6).
    `offload`: the optimizer may be on the host, where a stage does not fit otherwise. `private`: operators that only
    trusted providers may run, by place: the first and the last so many. `regions`: where providers may be; empty:
    anywhere. `min_mbit`: lines of less are left alone. `most`: pipelines at most; 0: as many as are best.
    `compress`: what goes between stages (`compression`)."""

    train: bool = True
    micro_batches: int = 8
    schedule: str = "1f1b"
    gradient: float = 1.0
    optimizer: float = 2.0
    recompute: bool = False
    offload: bool = False
    private: tuple[int, int] = (0, 0)
    regions: tuple[str, ...] = ()
    min_mbit: float = 0.0
    most: int = 0
    compress: str = NONE

    def __post_init__(self) -> None:
        if self.schedule not in SCHEDULES:
            raise ValueError(f"schedule={self.schedule}: must be one of {', '.join(SCHEDULES)}")
        if self.compress not in COMPRESS:
            raise ValueError(f"compress={self.compress}: must be one of {', '.join(COMPRESS)}")
        if self.micro_batches < 1:
            raise ValueError(f"micro_batches={self.micro_batches}: must be 1 or more")
        for key in ("gradient", "optimizer", "min_mbit"):
            if not 0 <= getattr(self, key) < math.inf:
                raise ValueError(f"{key}={getattr(self, key)}: must be 0 or more")
        if min(self.private) < 0:
            raise ValueError(f"private={list(self.private)}: must be 0 or more")

    @property
    def passes(self) -> float:
        return (4.0 if self.recompute else 3.0) if self.train else 1.0

    def in_flight(self, stages_after: int) -> int:
        """Micro-batches that a stage keeps, with so many behind it."""
        if not self.train:
            return 1
        return in_flight(self.schedule, stages_after, self.micro_batches)


class Cost(NamedTuple):
    """Of one stage; seconds of a micro-batch, bytes; `update_s` once a step, of an optimizer that is on the host."""

    compute_s: float
    send_s: float
    receive_s: float
    device_bytes: float
    host_bytes: float = 0.0
    update_s: float = 0.0

    @property
    def slowest_s(self) -> float:
        return max(self.compute_s, self.send_s, self.receive_s)


@dataclass(frozen=True, eq=False)
class Costs:
    """A chain, a fleet and a workload, with sums from the chain's beginning, so that a stage's cost is a difference.
    `absent`: places of providers that have gone, which the others keep theirs after. `factors`: of what goes from one
    provider to another between stages, the share that is sent (`adatopk`)."""

    chain: Chain
    fleet: Fleet
    work: Workload
    absent: frozenset[int] = frozenset()
    factors: Mapping[tuple[int, int], float] = field(default_factory=dict)
    known: Known = field(default_factory=Known, repr=False)

    @functools.cached_property
    def flops(self) -> Numbers:
        """Of a micro-batch up to each position, all passes."""
        return _sums(self.chain.work) * self.work.passes

    @functools.cached_property
    def weights(self) -> Numbers:
        """Bytes up to each position; of a tied parameter at each of its readers."""
        return _sums(self.chain.weights)

    @functools.cached_property
    def ahead(self) -> Numbers:
        """Bytes that are sent over each position; with `adaptive` by the strongest codec that a line may have: where a
        weaker one is enough, computing is a stage's slowest either way."""
        return self.chain.ahead - (1 - strongest(self.work.compress)) * self.chain.hidden

    @functools.cached_property
    def back(self) -> Numbers:
        """What goes back: nothing, where nothing is trained."""
        return self.chain.back * (strongest(self.work.compress) if self.work.train else 0.0)

    @functools.cached_property
    def usable(self) -> tuple[int, ...]:
        """Providers that are there and that the workload allows, by place."""
        given = ((at, each) for at, each in enumerate(self.fleet.providers) if at not in self.absent)
        return tuple(at for at, each in given if not self.work.regions or each.region in self.work.regions)

    @functools.cached_property
    def private(self) -> Numbers:
        """How many private operators are before each position."""
        first, last = self.work.private
        flags = np.zeros(self.chain.count)
        flags[:first] = 1
        flags[max(0, self.chain.count - last) :] = 1
        return _sums(flags)

    def per_weight(self, offload: bool) -> float:
        """Bytes on the device for a byte of weights."""
        if not self.work.train:
            return 1.0
        return 1.0 + self.work.gradient + (0.0 if offload else self.work.optimizer)

    def memory(self, in_flight: int, offload: bool) -> Numbers:
        """Bytes on the device up to each position, without what is received."""
        kept = 0.0 if not self.work.train else 1.0 if self.work.recompute else float(in_flight)
        each = self.per_weight(offload)
        known = self.known.memory
        if (kept, each) not in known:
            known[kept, each] = self.weights * each + _sums(self.chain.held) + _sums(self.chain.saved) * kept
        return known[kept, each]

    def received(self, begin: int, in_flight: int) -> float:
        """Bytes of what came in."""
        return float(self.chain.ahead[begin]) * in_flight

    def shared(self, begin: int, end: int) -> float:
        """Bytes of weights that are counted twice within a stage."""
        return sum(nbytes for p, q, nbytes in self.chain.ties if begin <= p and q < end)

    def device_bytes(self, begin: int, end: int, in_flight: int, offload: bool = False) -> float:
        sums = self.memory(in_flight, offload)
        own = float(sums[end] - sums[begin]) - self.shared(begin, end) * self.per_weight(offload)
        return own + self.received(begin, in_flight)

    @functools.cached_property
    def least_bytes(self) -> float:
        """Of the whole chain on devices, with one micro-batch on its way: what a pipeline has at least."""
        return self.device_bytes(0, self.chain.count, 1, self.work.offload and self.work.train)

    def host_bytes(self, begin: int, end: int) -> float:
        """With the optimizer on the host."""
        weights = float(self.weights[end] - self.weights[begin]) - self.shared(begin, end)
        return weights * self.work.optimizer

    def offload_s(self, provider: Provider) -> float:
        """A byte of weights, once a step: its gradient down and itself up, and the state read and written."""
        copied = (self.work.gradient + 1.0) / (provider.host_gbps * 1e9)
        updated = (2 * self.work.optimizer + self.work.gradient + 1.0) / HOST_BYTES_PER_S
        return copied + updated

    def compute_s(self, p: int, begin: int, end: int) -> float:
        return float(self.flops[end] - self.flops[begin]) / self.fleet.providers[p].flops

    def line(self, p: int, q: int) -> float:
        """Seconds a byte, uncompressed; infinite where the workload does not take the line."""
        beta = self.fleet.beta_s(p, q)
        return beta if 8e-6 / beta >= self.work.min_mbit else math.inf

    def beta(self, p: int | None, q: int | None) -> float:
        """The same of what goes between stages, compressed as it is; 0 where there is nobody."""
        if p is None or q is None:
            return 0.0
        found = self.known.lines.get((p, q))
        if found is None:
            found = self.known.lines[p, q] = self.line(p, q) * self.factors.get((p, q), 1.0)
        return found

    def offloads(self, p: int, begin: int, end: int, in_flight: int) -> bool | None:
        """Whether the stage needs the host's memory; None where it does not fit, or p may not have it."""
        provider = self.fleet.providers[p]
        if not provider.trusted and self.private[end] > self.private[begin]:
            return None
        if self.device_bytes(begin, end, in_flight) <= provider.mem_gib * GIB:
            return False
        if not (self.work.offload and self.work.train):
            return None
        fits = self.device_bytes(begin, end, in_flight, True) <= provider.mem_gib * GIB
        return True if fits and self.host_bytes(begin, end) <= provider.host_gib * GIB else None

    def stage(self, order: Sequence[int], cuts: Sequence[int], at: int) -> Cost | None:
        """Of the stage `at` of a pipeline of providers `order`, cut at `cuts` (0 and the end among them); None where
        its provider cannot hold it, or may not."""
        p, begin, end = order[at], cuts[at], cuts[at + 1]
        before = order[at - 1] if at else None
        after = order[at + 1] if at + 1 < len(order) else None
        in_flight = self.work.in_flight(len(order) - 1 - at)
        offload = self.offloads(p, begin, end, in_flight)
        if offload is None:
            return None
        came, returned, sent, back = self.ahead[begin], self.back[begin], self.ahead[end], self.back[end]
        if self.work.compress == ADAPTIVE:
            (came, returned), (sent, back) = over(self, order, cuts, at - 1), over(self, order, cuts, at)
        return Cost(
            compute_s=self.compute_s(p, begin, end),
            send_s=_times(sent, self.beta(p, after)) + _times(returned, self.beta(p, before)),
            receive_s=_times(came, self.beta(before, p)) + _times(back, self.beta(after, p)),
            device_bytes=self.device_bytes(begin, end, in_flight, offload),
            host_bytes=self.host_bytes(begin, end) if offload else 0.0,
            update_s=self.update_s(p, begin, end) if offload else 0.0,
        )

    def update_s(self, p: int, begin: int, end: int) -> float:
        """With the optimizer on the host, once a step."""
        weights = float(self.weights[end] - self.weights[begin]) - self.shared(begin, end)
        return weights * self.offload_s(self.fleet.providers[p])

    def stages(self, order: Sequence[int], cuts: Sequence[int]) -> list[Cost] | None:
        """Of all; None where one of them cannot be."""
        known, key = self.known.stages, (tuple(order), tuple(cuts))
        if key not in known:
            found = [self.stage(order, cuts, at) for at in range(len(order))]
            known[key] = [each for each in found if each is not None] if None not in found else None
        return known[key]

    def slowest_s(self, order: Sequence[int], cuts: Sequence[int]) -> float:
        """Of a pipeline: seconds between micro-batches when it is full; infinite where it cannot be."""
        found = self.stages(order, cuts)
        return math.inf if found is None else max(each.slowest_s for each in found)

    def latency_s(self, order: Sequence[int], cuts: Sequence[int]) -> float:
        """Of one micro-batch alone through the pipeline, and back where it is trained; infinite likewise."""
        found = self.stages(order, cuts)
        if found is None:
            return math.inf
        return sum(each.compute_s for each in found) + sum(map(sum, self.line_s(order, cuts)))

    def line_s(self, order: Sequence[int], cuts: Sequence[int]) -> tuple[list[float], list[float], list[float]]:
        """(seconds of a micro-batch on each line ahead, and back; latencies there and back)."""
        ahead, back, waits = [], [], []
        for at, (p, q) in enumerate(itertools.pairwise(order)):
            sent, returned = over(self, order, cuts, at)
            ahead.append(_times(sent, self.beta(p, q)))
            back.append(_times(returned, self.beta(q, p)))
            waits.append(self.fleet.alpha_s(p, q) + (self.fleet.alpha_s(q, p) if self.work.train else 0.0))
        return ahead, back, waits


def _sums(values: NDArray[np.float64]) -> Numbers:
    return np.concatenate([[0.0], np.cumsum(values)])


def _times(nbytes: float, beta: float) -> float:
    """0 bytes take no time on a line that does not exist."""
    return float(nbytes) * beta if nbytes else 0.0
