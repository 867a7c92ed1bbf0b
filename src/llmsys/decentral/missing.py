"""Why a fleet cannot hold a model: what is missing, and what would do."""

from __future__ import annotations

import itertools
import math

from llmsys.decentral.cost import Costs
from llmsys.decentral.fleet import GIB


def missing(costs: Costs) -> str:
    """In a line, for `costs` of which no pipeline was found."""
    work, fleet = costs.work, costs.fleet
    if not costs.usable:
        return f"regions={list(work.regions)}: no provider is there"
    chain = costs.chain
    need = costs.least_bytes / GIB
    have = sum(fleet.providers[p].mem_gib for p in costs.usable)
    largest = max(fleet.providers[p].mem_gib for p in costs.usable)
    what = "weights, gradients, optimizer and activations" if work.train else "weights"
    begin = f"{len(costs.usable)} providers cannot hold the model: it needs {need:.2f} GiB for {what}"
    if have < need:
        more = math.ceil((need - have) / largest)
        return (
            f"{begin}, they have {have:.2f}: {need - have:.2f} GiB are missing; {more} more of {largest:g} GiB would do"
        )
    places = chain.places.tolist()
    parts = [costs.device_bytes(i, j, 1, work.offload and work.train) / GIB for i, j in itertools.pairwise(places)]
    worst = max(range(len(parts)), key=parts.__getitem__)
    if parts[worst] > largest:
        name = chain.names[places[worst]]
        return (
            f"{begin}, and operator {name} alone {parts[worst]:.2f} GiB: no provider has more than {largest:g}; one of "
            f"{parts[worst]:.2f} GiB would do"
        )
    ready = any(fleet.providers[p].trusted for p in costs.usable)
    if sum(work.private) and not ready:
        return f"private={list(work.private)}: no provider is trusted"
    most = max(work.in_flight(len(costs.usable)), 1)
    full = costs.device_bytes(0, chain.count, most, work.offload and work.train) / GIB
    return (
        f"{begin}, and with {most} micro-batches on their way up to {full:.2f}; they have {have:.2f}, in parts that no "
        f"cut fits, or behind lines of less than {work.min_mbit:g} Mbit/s; {max(0.0, full - have):.2f} GiB more would "
        "do"
    )
