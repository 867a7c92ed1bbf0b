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
    size = _mib if max(need, have) < 0.1 else _gib
    largest = max(fleet.providers[p].mem_gib for p in costs.usable)
    what = "weights, gradients, optimizer and activations" if work.train else "weights"
    count = "1 provider" if len(costs.usable) == 1 else f"{len(costs.usable)} providers"
    begin = f"{count} cannot hold the model: it needs {size(need)} for {what}"
    if have < need:
        more = math.ceil((need - have) / largest)
        return (
            f"{begin}, they have {size(have)}: {size(need - have)} are missing; {more} more of {largest:g} GiB would do"
        )
    places = chain.places.tolist()
    parts = [costs.device_bytes(i, j, 1, work.offload and work.train) / GIB for i, j in itertools.pairwise(places)]
    worst = max(range(len(parts)), key=parts.__getitem__)
    if parts[worst] > largest:
        name = chain.names[places[worst]]
        return (
            f"{begin}, and operator {name} alone {size(parts[worst])}: no provider has more than {largest:g} GiB; one "
            f"of {size(parts[worst])} would do"
        )
    ready = any(fleet.providers[p].trusted for p in costs.usable)
    if sum(work.private) and not ready:
        return f"private={list(work.private)}: no provider is trusted"
    most = max(work.in_flight(len(costs.usable)), 1)
    full = costs.device_bytes(0, chain.count, most, work.offload and work.train) / GIB
    would = f"; {size(full - have)} more would do" if full > have else ""
    return (
        f"{begin}, and with {most} micro-batches on their way up to {size(full)}; they have {size(have)}, in parts "
        f"that no cut fits{would}"
    )


def _gib(value: float) -> str:
    return f"{value:.2f} GiB"


def _mib(value: float) -> str:
    return f"{value * 1024:.2f} MiB"
