"""What no plan can beat: a lower bound of the time of a step that counts devices, memories and lines.

With R replicas, M micro-batches, F FLOPs of one, G bytes of gradients of the model:

    alone + (M - R) / rate + sync

rate    of all pipelines together: provider p gives at most flops_p / F, and where its memory holds the share m_p < 1 of
        the model, at most m_p of what its lines let through, if they carry the least that crosses any cut; and R
        pipelines of several stages at most R times what the best lines let through
alone   the first micro-batch of a pipeline: on the fastest device, over the best lines as often as memory asks for
sync    2 (R - 1) / R of the gradients that R replicas hold, over all lines at once

The least over R. A step's pipelines end at the latest when their mean, weighted by their rates, does: hence M - R.
"""

from __future__ import annotations

import math

import numpy as np

from llmsys.decentral.cost import Costs
from llmsys.decentral.fleet import GIB


def step_s(costs: Costs) -> float:
    """Seconds that a step takes at least; infinite where all memory together does not hold the model."""
    members = [costs.fleet.providers[p] for p in costs.usable]
    flops = np.array([each.flops for each in members])
    memory = np.array([each.mem_gib for each in members]) * GIB
    up = np.array([each.up_mbit for each in members]) / 8e-6
    down = np.array([each.down_mbit for each in members]) / 8e-6
    offload = costs.work.offload and costs.work.train
    need = costs.chain.weight_bytes * costs.per_weight(offload)
    share = np.minimum(memory / need, 1.0)
    if share.sum() < 1:
        return math.inf
    inner = costs.chain.places[1:-1]
    ahead, back = float(costs.ahead[inner].min()), float(costs.back[inner].min())
    first, last = np.maximum(ahead / up, back / down), np.maximum(back / up, ahead / down)
    crossing = np.minimum(first, last)  # seconds of its lines, as the first or the last stage, which have one neighbour
    through = np.divide(1.0, crossing, out=np.full(len(members), math.inf), where=crossing > 0)
    whole = float(costs.flops[-1])
    lines = np.where(share < 1, share * through, math.inf)
    total = float(np.minimum(flops / whole, lines).sum())
    hops = math.ceil(1 / share.max()) - 1
    alone = whole / flops.max() + hops * 2 * float(crossing.min())
    count = np.arange(1, max(1, int(share.sum())) + 1)
    rate = np.minimum(total, count * float(through.max())) if share.max() < 1 else np.full(len(count), total)
    gradients = costs.chain.weight_bytes * costs.work.gradient
    sync = 2 * (count - 1) * gradients / float(np.minimum(up, down).sum()) if costs.work.train else 0.0
    left = np.maximum(costs.work.micro_batches - count, 0)
    return (
        float((alone + left / rate + sync).min()) if costs.work.train else costs.work.micro_batches / float(rate.max())
    )
