"""What no plan can beat: a lower bound of the time of a step that counts devices, memories and lines.

With R replicas of S stages or more, M micro-batches, F FLOPs of one, G bytes of gradients of the model:

    alone + (M - R) / rate + sync

share   of the work of a micro-batch that a provider's memory holds: a stage of m bytes has (m / all memory) F FLOPs and
        `slack` more at most, as memory and work do not lie in the chain in one proportion
kept    k stages before the end a stage keeps what it received of f(k) micro-batches (`Workload.in_flight`), of a bytes
        each; all S together of K(S) = f(0) + ... + f(S-2). K is convex: K(S) >= K(s) + (S-s) f(s-1) for any s. So the
        memories of a pipeline's providers, each without a f(s-1), are no less than the model's with a (K(s) - s f(s-1))
        more: shares can be reckoned in these, for whichever s says most
lines   what a provider's lines let through as a stage in the middle, which sends and receives the least that crosses a
        cut in both directions; two of each pipeline are at an end and have one neighbour
rate    of all pipelines: by provider the lesser of its FLOPs and its share of what its lines let through; and the
        shares, of which there have to be enough for R pipelines, at the rate of their lines
alone   the first micro-batch of a pipeline: on the fastest device, S - 1 times over the best lines and back, S as
        many as the largest memories need
sync    2 (R - 1) / R of the gradients that R replicas hold, over all lines at once

The least over R. A step's pipelines end at the latest when their mean, weighted by their rates, does: hence M - R.
"""

from __future__ import annotations

import math
from collections.abc import Iterator

import numpy as np

from llmsys.decentral.chain import Numbers
from llmsys.decentral.cost import Costs
from llmsys.decentral.fleet import GIB


def step_s(costs: Costs) -> float:
    """Seconds that a step takes at least; infinite where all memory together does not hold the model."""
    work, members = costs.work, [costs.fleet.providers[p] for p in costs.usable]
    flops = np.array([each.flops for each in members])
    memory = np.array([each.mem_gib for each in members]) * GIB
    up = np.array([each.up_mbit for each in members]) / 8e-6
    down = np.array([each.down_mbit for each in members]) / 8e-6
    inner = costs.chain.places[1:-1]
    thinnest = min([1.0, *costs.factors.values()])
    received, returned = (float(each[inner].min()) if len(inner) else 0.0 for each in (costs.ahead, costs.back))
    ahead, back = received * thinnest, returned * thinnest
    need, slack = _memory(costs, float(memory.max()))
    room = memory + slack
    kept = np.concatenate([[0.0], np.cumsum([received * work.in_flight(k) for k in range(len(members) - 1)])])
    enough = np.flatnonzero(float(room.max()) * np.arange(1, len(members) + 1) >= need + kept)
    shares = list(_shares(costs, room, need, received, kept))
    if not len(enough) or (most := min(share.sum() for share in shares)) < 1:
        return math.inf

    count = np.arange(1, int(most) + 1)
    middle = _through((ahead + back) / np.minimum(up, down))
    end = _through(np.minimum(np.maximum(ahead / up, back / down), np.maximum(back / up, ahead / down)))

    def with_ends(rates: Numbers, at_end: Numbers) -> Numbers:
        """Of `count` pipelines, with two of each at an end."""
        gained = np.concatenate([[0.0], np.cumsum(np.sort(at_end - rates)[::-1])])
        return rates.sum() + gained[np.minimum(2 * count, len(members))]

    by_flops = flops / float(costs.flops[-1])
    alone = room >= need  # has no lines to wait for
    held, held_end = (np.where(alone, by_flops, np.minimum(by_flops, room / need * each)) for each in (middle, end))
    rate = np.minimum(with_ends(held, held_end), by_flops.sum())
    if not alone.any() and np.isfinite(end).all():
        for share in shares:
            rate = np.minimum(rate, with_ends(share * middle, share * end))
        rate = np.minimum(rate, count * float(end.max()))
    if not work.train:
        return work.micro_batches / float(rate.max())
    first = 1 / float(by_flops.max()) + int(enough[0]) * (ahead + back) / float(np.minimum(up.max(), down.max()))
    gradients = costs.chain.weight_bytes * work.gradient
    sync = 2 * (count - 1) * gradients / float(np.minimum(up, down).sum())
    return float((first + np.maximum(work.micro_batches - count, 0) / rate + sync).min())


def _memory(costs: Costs, largest: float) -> tuple[float, float]:
    """(bytes of the chain on devices with one micro-batch on its way; of a stage of at most `largest` bytes, how many
    more than it has its work may stand for)."""
    offload = costs.work.offload and costs.work.train
    places = costs.chain.places
    need = costs.least_bytes
    memory = costs.memory(1, offload)[places]
    beyond = costs.flops[places] / costs.flops[-1] * need - memory
    ties = sum(nbytes for *_, nbytes in costs.chain.ties) * costs.per_weight(offload)
    ends = np.searchsorted(memory, memory + largest + ties, side="right")
    most = (beyond[begin : max(end, begin + 1)].max() - beyond[begin] for begin, end in enumerate(ends))
    return need, float(max(most)) + ties


def _shares(costs: Costs, room: Numbers, need: float, received: float, kept: Numbers) -> Iterator[Numbers]:
    """Of a pipeline by provider, for s = 0, where nothing is kept, 1, 2, 4, ...; `kept`: K(1), K(2), ..."""
    yield room / need
    for s in (2**k for k in range(len(room).bit_length())):
        slope = received * costs.work.in_flight(s - 1)
        left = need + float(kept[s - 1]) - s * slope
        if left > 0:
            yield np.maximum(room - slope, 0.0) / left


def _through(seconds: Numbers) -> Numbers:
    return np.divide(1.0, seconds, out=np.full(len(seconds), math.inf), where=seconds > 0)
