"""What tests of plans share: chains and fleets drawn by a seed, and what a pipeline costs by its definition alone."""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator, Sequence

import numpy as np

from llmsys.decentral.chain import Chain
from llmsys.decentral.cost import Costs, Workload
from llmsys.decentral.fleet import GIB, Between, Fleet, Provider

MB = 1e6


def chain(seed: int, count: int, tied: bool = False) -> Chain:
    """`count` operators, unlike each other; `tied`: the last reads a parameter of the first."""
    random = np.random.default_rng(seed)
    crossing = np.r_[0, random.uniform(0.5, 4, count - 1), 0] * MB
    weights = random.uniform(1, 3, count) * MB
    if tied:
        weights[[0, -1]] += 3 * MB
    return Chain(
        names=tuple(f"op{at}" for at in range(count)),
        work=random.uniform(1, 5, count) * 1e9,
        weights=weights,
        saved=random.uniform(1, 3, count) * MB,
        ahead=crossing,
        back=crossing * (random.random(count + 1) < 0.9),
        ties=((0, count - 1, 3 * MB),) if tied else (),
    )


def fleet(seed: int, providers: int, operators: int, roomy: float = 1.6) -> Fleet:
    """In two regions with a thin line between; memory for `roomy` times what `operators` need, more or less."""
    random = np.random.default_rng(seed)
    return Fleet(
        providers=tuple(
            Provider(
                name=f"p{at}",
                tflops=float(random.choice([0.05, 0.1, 0.2, 0.4])),
                mem_gib=float(random.uniform(0.5, 1.6)) * operators * 12 * MB / providers * roomy / GIB,
                up_mbit=float(random.uniform(50, 800)),
                down_mbit=float(random.uniform(50, 800)),
                region=str(random.choice(["a", "b"])),
                host_gib=float(random.integers(0, 2)),
                trusted=bool(random.random() < 0.7),
            )
            for at in range(providers)
        ),
        between={("a", "b"): Between(delay_ms=20, mbit=200)},
    )


def costs(seed: int, providers: int, operators: int, roomy: float = 1.6, **work: object) -> Costs:
    return Costs(
        chain(seed, operators, tied=bool(seed % 2)),
        fleet(seed, providers, operators, roomy),
        Workload(**work),  # type: ignore[arg-type]
    )


def by_definition(costs: Costs, order: Sequence[int], cuts: Sequence[int]) -> tuple[float, float]:
    """(slowest stage, sum) of a pipeline in seconds, operator by operator; infinite where it cannot be."""
    chain, work, fleet = costs.chain, costs.work, costs.fleet
    passes = {(True, True): 4, (True, False): 3}.get((work.train, work.recompute), 1)
    slowest = total = 0.0
    for at, p in enumerate(order):
        provider, inside = fleet.providers[p], range(cuts[at], cuts[at + 1])
        if not inside:
            return math.inf, math.inf
        private = [k for k in inside if k < work.private[0] or k >= chain.count - work.private[1]]
        if private and not provider.trusted:
            return math.inf, math.inf
        flight = 1
        if work.train:
            flight = work.micro_batches if work.schedule == "gpipe" else min(work.micro_batches, len(order) - at)
        own = sum(chain.weights[k] for k in inside)
        weights = own - sum(nbytes for a, b, nbytes in chain.ties if a in inside and b in inside)
        kept = sum(chain.saved[k] for k in inside) * (0 if not work.train else 1 if work.recompute else flight)
        kept += chain.ahead[cuts[at]] * flight + sum(chain.held[k] for k in inside)
        seconds = sum(chain.work[k] for k in inside) * passes / (provider.efficiency * provider.tflops * 1e12)
        each = 1 + (work.gradient + work.optimizer if work.train else 0)
        if weights * each + kept > provider.mem_gib * GIB:
            less = each - work.optimizer
            host = weights * work.optimizer <= provider.host_gib * GIB
            if not (work.train and work.offload and host and weights * less + kept <= provider.mem_gib * GIB):
                return math.inf, math.inf
        sends = receives = 0.0
        for other, cut, ahead_out in ((at + 1, cuts[at + 1], True), (at - 1, cuts[at], False)):
            if not 0 <= other < len(order):
                continue
            q = fleet.providers[order[other]]
            joint = fleet.joint(p, order[other])
            out = 8e-6 / min(provider.up_mbit, q.down_mbit, joint.mbit)
            home = 8e-6 / min(q.up_mbit, provider.down_mbit, joint.mbit)
            back = chain.back[cut] if work.train else 0.0
            sends += (chain.ahead[cut] if ahead_out else back) * out
            receives += (back if ahead_out else chain.ahead[cut]) * home
            total += ((chain.ahead[cut] if ahead_out else back) * out) + (
                joint.delay_ms * 1e-3 if ahead_out or work.train else 0.0
            )
        slowest = max(slowest, seconds, sends, receives)
        total += seconds
    return slowest, total


def all_cuts(operators: int, stages: int) -> Iterator[tuple[int, ...]]:
    for inner in itertools.combinations(range(1, operators), stages - 1):
        yield (0, *inner, operators)


def brute(costs: Costs, objective: str) -> float:
    """The best of all pipelines there are."""
    best, which = math.inf, objective == "latency"
    for stages in range(1, len(costs.fleet) + 1):
        for order in itertools.permutations(range(len(costs.fleet)), stages):
            for cuts in all_cuts(costs.chain.count, stages):
                best = min(best, by_definition(costs, order, cuts)[which])
    return best
