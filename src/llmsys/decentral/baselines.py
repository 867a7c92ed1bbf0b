"""How others lay a model out over unequal machines, to be compared with: from what they publish, none of their code.

    equal              as many layers to each, in the order given
    memory             layers by memory, the largest first (exo's ring)
    speed              layers by speed, the fastest first
    water_filling      the same, but none gets more than it has memory for: the others take the rest (Parallax)
    petals             providers come one after another, each serves as many layers in a row as it has memory for, where
                       least is served so far (Petals)
    swarm              equal stages, as few as every provider has memory for one of, providers spread so that the
                       slowest stage is fastest (SWARM)

The first four are pipelines of all providers. In the last two several serve the same layers, and micro-batches find a
way through (`routed`).
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Sequence

import numpy as np

from llmsys.cost.links import steps, volume
from llmsys.decentral.cost import Costs
from llmsys.decentral.fleet import GIB
from llmsys.decentral.order import Pipeline

Spans = list[tuple[int, int, int]]
"""(provider, begin, end): positions of the chain."""


def equal(costs: Costs) -> Pipeline | None:
    members = list(costs.usable)
    return _pipeline(costs, members, _parts(costs, [1.0] * len(members)))


def memory(costs: Costs) -> Pipeline | None:
    members = sorted(costs.usable, key=lambda p: -costs.fleet.providers[p].mem_gib)
    return _pipeline(costs, members, _parts(costs, [costs.fleet.providers[p].mem_gib for p in members]))


def speed(costs: Costs) -> Pipeline | None:
    members = sorted(costs.usable, key=lambda p: -costs.fleet.providers[p].flops)
    return _pipeline(costs, members, _parts(costs, [costs.fleet.providers[p].flops for p in members]))


def water_filling(costs: Costs) -> Pipeline | None:
    """A common level of work by speed, and each provider up to that level or to its brim, whichever is lower."""
    members = sorted(costs.usable, key=lambda p: -costs.fleet.providers[p].flops)
    bounds = _layers(costs)
    layers = len(bounds) - 1
    room = [min(layers, _capacity(costs, p, len(members) - 1 - at)) for at, p in enumerate(members)]
    speeds = [costs.fleet.providers[p].flops for p in members]
    if sum(room) < layers:
        return None
    low, high = 0.0, layers / min(speeds)
    for _ in range(60):
        level = (low + high) / 2
        filled = sum(min(most, level * each) for most, each in zip(room, speeds, strict=True))
        low, high = (low, level) if filled >= layers else (level, high)
    wanted = [min(most, high * each) for most, each in zip(room, speeds, strict=True)]
    return _pipeline(costs, members, _whole(wanted, layers, room))


PIPELINES: dict[str, Callable[[Costs], Pipeline | None]] = {
    "equal": equal,
    "memory": memory,
    "speed": speed,
    "water_filling": water_filling,
}


def petals(costs: Costs) -> Spans:
    bounds = _layers(costs)
    layers = len(bounds) - 1
    served = np.zeros(layers)
    spans: Spans = []
    for p in costs.usable:
        count = min(layers, _capacity(costs, p, 0))
        if count < 1:
            continue
        rate = costs.fleet.providers[p].flops / count
        # where the least served layer is served least, then the next: as its servers choose
        starts = range(layers - count + 1)
        begin = min(starts, key=lambda at: (sorted(served[at : at + count].tolist()), at))
        served[begin : begin + count] += rate
        spans.append((p, bounds[begin], bounds[begin + count]))
    return spans


def swarm(costs: Costs) -> Spans:
    bounds = _layers(costs)
    layers, members = len(bounds) - 1, costs.usable
    best: Spans = []
    for stages in range(1, min(layers, len(members)) + 1):
        edges = [bounds[round(at * layers / stages)] for at in range(stages + 1)]
        able = [
            p
            for p in members
            if all(
                costs.offloads(p, i, j, costs.work.in_flight(stages - 1)) is not None
                for i, j in itertools.pairwise(edges)
            )
        ]
        if len(able) >= stages and (len(able) == len(members) or not best):
            speeds, spans = [0.0] * stages, []
            for p in sorted(able, key=lambda p: -costs.fleet.providers[p].flops):
                at = min(range(stages), key=lambda k: (speeds[k], k))
                speeds[at] += costs.fleet.providers[p].flops
                spans.append((p, edges[at], edges[at + 1]))
            best = spans
            if len(able) == len(members):
                break
    return best


SWARMS: dict[str, Callable[[Costs], Spans]] = {"petals": petals, "swarm": swarm}


def routed(costs: Costs, spans: Spans) -> float:
    """Micro-batches a second, of a step where the workload trains; 0 where no way leads through.

    From each position a micro-batch goes to one of the providers that serve it, as their rates are, whoever had it
    before, and stays to the end of what that one serves: as Petals' clients and SWARM's trainers choose, but without
    chance. So each provider has a whole number of them, each of its lines what comes from all and goes to all, and the
    busiest sets the pace. Gradients are added up by those that hold the same operators."""
    hops = _hops(costs, spans)
    if not hops:
        return 0.0
    total, chain = costs.work.micro_batches, costs.chain
    busy: dict[tuple[int, str], float] = {}
    alone: dict[int, float] = {0: 0.0}  # of a micro-batch that goes the longest way
    for p, begin, end, count in hops:
        seconds = costs.compute_s(p, begin, end)
        busy[p, "computes"] = busy.get((p, "computes"), 0.0) + count * seconds
        onward = 0.0
        after = [(q, number) for q, at, _, number in hops if at == end]
        arriving = sum(number for _, number in after)
        for q, number in after:
            share = count * number / arriving
            messages = ((p, q, float(costs.ahead[end])), (q, p, float(costs.back[end])))
            for sender, receiver, nbytes in messages if p != q else ():
                wire = nbytes * costs.fleet.beta_s(sender, receiver)
                onward += (wire + costs.fleet.alpha_s(sender, receiver)) * number / arriving
                busy[sender, "sends"] = busy.get((sender, "sends"), 0.0) + share * wire
                busy[receiver, "receives"] = busy.get((receiver, "receives"), 0.0) + share * wire
        alone[end] = max(alone.get(end, 0.0), alone[begin] + seconds + onward)
    if not costs.work.train:
        return total / max(busy.values())
    of_each = {p: sum(count for q, *_, count in hops if q == p) for p, *_ in hops}
    step = alone[chain.count] + max(seconds * (1 - 1 / of_each[p]) for (p, _), seconds in busy.items())
    return total / (step + _agreed(costs, spans))


def _hops(costs: Costs, spans: Spans) -> list[tuple[int, int, int, int]]:
    """(provider, where it begins and ends, how many of a step's micro-batches); none where no way leads through."""
    rates = {span: _rate(costs, *span) for span in spans}
    arrives, found = {0: costs.work.micro_batches}, []
    while any(at < costs.chain.count for at in arrives):
        at = min(arrives)
        count = arrives.pop(at)
        open_ = [span for span in spans if span[1] <= at < span[2]]
        if not open_:
            return []
        wanted = [count * rates[span] / sum(rates[each] for each in open_) for span in open_]
        for (p, _, end), part in zip(open_, _whole(wanted, count, [count] * len(open_)), strict=True):
            if part:
                found.append((p, at, end, part))
                arrives[end] = arrives.get(end, 0) + part
    return found


def _rate(costs: Costs, p: int, begin: int, end: int) -> float:
    """What p can do by its device and its own lines."""
    provider = costs.fleet.providers[p]
    sends = float(costs.ahead[end] + costs.back[begin]) * 8e-6 / provider.up_mbit
    receives = float(costs.ahead[begin] + costs.back[end]) * 8e-6 / provider.down_mbit
    return 1 / max(costs.compute_s(p, begin, end), sends, receives)


def _agreed(costs: Costs, spans: Spans) -> float:
    """Seconds to add up gradients, of the provider that takes longest: as `score.sync_s`, to the next that holds some
    of the same operators."""
    longest = 0.0
    edges = sorted({edge for _, *span in spans for edge in span})
    for at, (p, begin, end) in enumerate(spans):
        others = [q for q, b, e in (*spans[at + 1 :], *spans[:at]) if max(b, begin) < min(e, end)]
        if not others:
            continue
        alpha, most = costs.fleet.alpha_s(p, others[0]), 1  # its next in the ring
        beta = costs.fleet.beta_s(p, others[0]) * costs.work.gradient
        seconds = {"ring": 0.0, "tree": 0.0}
        for low, high in itertools.pairwise(edge for edge in edges if begin <= edge <= end):
            holders = sum(b <= low and high <= e for _, b, e in spans)
            most = max(most, holders)
            for way in seconds if holders > 1 else ():
                seconds[way] += (
                    volume("all_reduce", holders, way) * float(costs.weights[high] - costs.weights[low]) * beta
                )
        if most > 1:
            longest = max(longest, min(own + steps("all_reduce", most, way) * alpha for way, own in seconds.items()))
    return longest


def _layers(costs: Costs) -> list[int]:
    """Positions between layers, both ends among them: nobody of these cuts within one."""
    chain = costs.chain
    if not chain.blocks:  # each operator is a layer
        return [int(at) for at in chain.places]
    allowed = set(chain.places.tolist())
    changes = [at for at in range(1, chain.count) if chain.blocks[at] != chain.blocks[at - 1] and at in allowed]
    return [0, *changes, chain.count]


def _capacity(costs: Costs, p: int, stages_after: int) -> int:
    """Layers of the common size that p has memory for."""
    bounds = _layers(costs)
    in_flight = costs.work.in_flight(stages_after)
    whole = costs.device_bytes(0, costs.chain.count, in_flight)
    return int(costs.fleet.providers[p].mem_gib * GIB / (whole / (len(bounds) - 1)))


def _parts(costs: Costs, weights: Sequence[float]) -> list[int]:
    layers = len(_layers(costs)) - 1
    return _whole([each * layers / sum(weights) for each in weights], layers, [layers] * len(weights))


def _whole(wanted: Sequence[float], total: int, most: Sequence[int]) -> list[int]:
    """Whole numbers near `wanted` that add up to `total`: the largest remainders first."""
    found = [min(int(each), limit) for each, limit in zip(wanted, most, strict=True)]
    while sum(found) < total:
        open_ = [at for at in range(len(found)) if found[at] < most[at]]
        if not open_:
            return []
        at = max(open_, key=lambda at: wanted[at] - found[at])
        found[at] += 1
    return found


def _pipeline(costs: Costs, members: Sequence[int], parts: Sequence[int]) -> Pipeline | None:
    """Of providers with a number of layers each; None where a provider cannot hold its part."""
    bounds = _layers(costs)
    order = [p for p, count in zip(members, parts, strict=False) if count]
    edges = np.cumsum([0, *(count for count in parts if count)])
    if not order or edges[-1] != len(bounds) - 1:
        return None
    cuts = tuple(bounds[edge] for edge in edges)
    seconds = costs.slowest_s(order, cuts)
    return Pipeline(tuple(order), cuts, seconds) if math.isfinite(seconds) else None
