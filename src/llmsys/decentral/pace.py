"""How long a pipeline takes for n micro-batches: (n - 1) periods after the first, and what comes once a step.

The period is that of the slowest stage (`cost`), or longer where too few micro-batches are on their way. From a stage's
forward pass to its backward pass of the same one the others behind it compute and lines carry it there and back, RTT
seconds; with f on their way there are at most f in that time (Little's law):

    1F1B, eager 1F1B    max(slowest, RTT / f of each stage)
    GPipe               the slowest forward pass or message ahead, and then likewise backward: two pipelines in turn
    inference           slowest

In 1F1B f is the number of stages from there on, so that the time of lines is never hidden; the eager one has one more
for each line and hides those that are no slower than a stage. Behind thin lines 1F1B takes longer than this, by up to a
half, since stages also wait for each other's turns. `schedule` plays a step event by event; tests hold the
two together. Once a step an optimizer on the host is updated, and what stages share (tied parameters) is added up and
sent.
"""

from __future__ import annotations

import math
from bisect import bisect_right
from collections.abc import Sequence
from typing import NamedTuple

from llmsys.decentral.compression import SHARES, codec
from llmsys.decentral.cost import Cost, Costs


class Pace(NamedTuple):
    """Seconds: the first micro-batch alone, each more, and once a step."""

    alone_s: float
    period_s: float
    once_s: float

    def step_s(self, micro_batches: int) -> float:
        return self.alone_s + (micro_batches - 1) * self.period_s + self.once_s


def pace(costs: Costs, order: Sequence[int], cuts: Sequence[int], slow: Sequence[float] = ()) -> Pace:
    """Of a pipeline that can be; `slow`: by stage, how many times as long it computes."""
    if slow:
        return _pace(costs, order, cuts, slow)
    known, key = costs.known.paces, (tuple(order), tuple(cuts))
    if key not in known:
        known[key] = _pace(costs, order, cuts, [1.0] * len(order))
    return known[key]


def _pace(costs: Costs, order: Sequence[int], cuts: Sequence[int], slow: Sequence[float]) -> Pace:
    stages = costs.stages(order, cuts)
    if stages is None:
        return Pace(math.inf, math.inf, 0.0)
    computing = [each.compute_s * factor for each, factor in zip(stages, slow, strict=True)]
    slowest = max(max(took, each.send_s, each.receive_s) for took, each in zip(computing, stages, strict=True))
    ahead, back, waits = costs.line_s(order, cuts)
    alone = costs.latency_s(order, cuts) + sum(
        took - each.compute_s for took, each in zip(computing, stages, strict=True)
    )
    if not costs.work.train:
        return Pace(alone, slowest, 0.0)
    if costs.work.schedule == "gpipe":
        share = 1 / costs.work.passes
        forward = max(*(took * share for took in computing), *ahead, 0.0)
        period = forward + max(*(took * (1 - share) for took in computing), *back, 0.0)
    else:
        period, rtt, last = slowest, 0.0, len(order) - 1
        for at in range(last, -1, -1):
            rtt += computing[at] + (ahead[at] + back[at] + waits[at] if at < last else 0.0)
            period = max(period, rtt / costs.work.in_flight(last - at))
    return Pace(alone, period, _once_s(costs, order, cuts, stages))


def _once_s(costs: Costs, order: Sequence[int], cuts: Sequence[int], stages: Sequence[Cost]) -> float:
    """Updates on hosts, of all at once; and of a parameter that two stages read the gradient to the first of them and
    the new values back, one parameter after another."""
    once = max(each.update_s for each in stages)
    for first, second, nbytes in costs.chain.ties:
        p, q = (order[bisect_right(cuts, at) - 1] for at in (first, second))
        if p != q:
            lossy = SHARES[codec(costs, order, cuts, order.index(q), back=True)]
            once += nbytes * (costs.work.gradient * lossy * costs.line(q, p) + costs.line(p, q))
            once += costs.fleet.alpha_s(q, p) + costs.fleet.alpha_s(p, q)
    return once
