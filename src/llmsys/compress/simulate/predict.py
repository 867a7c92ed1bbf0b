"""Iterations of a model with one method on one cluster, and the link rate at which the method stops to pay."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence
from dataclasses import dataclass

from llmsys.compress import timeline
from llmsys.compress.config import CompressConfig
from llmsys.compress.kernels_cost import Rates, work
from llmsys.compress.paper_models import PaperModel, Parameter
from llmsys.compress.simulate.clusters import Cluster
from llmsys.compress.timeline import Bucket, Round, Timeline
from llmsys.cost import compressed
from llmsys.cost.compressed import Named

MIB = 2**20
FIRST_MIB = 1
"""DDP's first bucket, which leaves early."""
PACKED = "powersgd_packed"
"""Power-SGD as its authors have it: after the backward pass, everything in one buffer."""
RATES_GBIT = (1e-3, 1e3)
"""Between which a break-even is looked for."""


@dataclass(frozen=True, kw_only=True)
class Machine:
    """What a device achieves: `compute` in the forward and the backward pass, `compress` in compression."""

    compute_flops_per_s: float
    compress: Rates


@dataclass(frozen=True, kw_only=True)
class Plan:
    """Iterations of a method, one for each of its kinds of steps: ACP-SGD has two."""

    forward_s: float
    steps: tuple[tuple[Bucket, ...], ...]
    overlap: bool = True

    def iteration(self, cluster: Cluster) -> Timeline:
        """The mean of the steps."""
        found = [timeline.play(self.forward_s, step, cluster.seconds, overlap=self.overlap) for step in self.steps]
        names = [field.name for field in dataclasses.fields(Timeline)]
        return Timeline(**{name: sum(getattr(each, name) for each in found) / len(found) for name in names})


def settings(method: str, model: PaperModel, *, min_rate: float, density: float) -> CompressConfig:
    """Of a simulated method; widths are the paper's."""
    name = "powersgd" if method == PACKED else method
    return CompressConfig(method=name, r=model.r, min_rate=min_rate, density=density)


def plan(
    model: PaperModel,
    method: str,
    config: CompressConfig,
    machine: Machine,
    world: int,
    *,
    bucket_mib: float,
    overlap: bool = True,
    first_mib: float | None = FIRST_MIB,
) -> Plan:
    """`bucket_mib` 0: each tensor alone. `first_mib`: of the first bucket, which DDP makes smaller unless it is told
    how large buckets are to be (None)."""
    parameters = model.parameters
    cut = [list(range(len(parameters)))[::-1]] if method == PACKED else ddp_buckets(parameters, bucket_mib, first_mib)
    backward_s = 2 * model.batch / machine.compute_flops_per_s
    steps = []
    for step in range(2 if method == "acpsgd" else 1):
        buckets = []
        for indices in cut:
            members = [parameters[i] for i in indices]
            seconds = backward_s * sum(p.flops for p in members)
            buckets.append(_bucket(members, config, machine.compress, world, step, seconds))
        steps.append(tuple(buckets))
    return Plan(
        forward_s=backward_s / 2 * sum(p.flops for p in parameters),
        steps=tuple(steps),
        overlap=overlap and method != PACKED,
    )


def ddp_buckets(parameters: Sequence[Parameter], bucket_mib: float, first_mib: float | None) -> list[list[int]]:
    """Indices of fp32 parameters, bucket by bucket, by DDP's rule: in the order in which gradients are there, a bucket
    is closed by the tensor that makes it as large as it is to be, or larger."""
    found: list[list[int]] = [[]]
    used = 0.0
    for index in reversed(range(len(parameters))):
        found[-1].append(index)
        used += 4 * math.prod(parameters[index].shape)
        cap = first_mib if first_mib is not None and len(found) == 1 else bucket_mib
        if used >= min(cap, bucket_mib) * MIB:
            found.append([])
            used = 0.0
    return found if found[-1] else found[:-1]


def _bucket(
    members: Sequence[Parameter], config: CompressConfig, rates: Rates, world: int, step: int, backward_s: float
) -> Bucket:
    gradients = [(p.name, p.shape, 4) for p in members]
    cost = work(gradients, config, rates, world, step)
    sent = messages(gradients, config, world, step)
    assert len(sent) == len(cost.before)
    last = len(sent) - 1
    rounds = tuple(
        Round(kind=kind, nbytes=nbytes, before_s=cost.before[i], during_s=cost.during if i == last else 0.0)
        for i, (kind, nbytes) in enumerate(sent)
    )
    return Bucket(backward_s=backward_s, rounds=rounds, after_s=cost.after)


def messages(gradients: Sequence[Named], config: CompressConfig, world: int, step: int) -> list[tuple[str, int]]:
    """(kind, bytes of the whole tensor) of a bucket's collectives, one after another."""
    sent = compressed.step_bytes(gradients, config, world, step)
    if config.method != "powersgd":
        return list(sent.items())
    # the first round is an even step of ACP-SGD: p of each matrix, and what travels whole
    first = compressed.step_bytes(gradients, dataclasses.replace(config, method="acpsgd"), world, 0)["all_reduce"]
    second = sent["all_reduce"] - first
    return [("all_reduce", first), *([("all_reduce", second)] if second else [])]


def break_even_gbit(method: Plan, plain: Plan, cluster: Cluster) -> float:
    """Up to which rate of the links between machines `method` is faster than `plain`: 0 if nowhere, and the highest
    rate of `RATES_GBIT` if still there. The last crossing, where there are several."""

    def faster(gbit: float) -> bool:
        at = cluster.at_rate(gbit)
        return method.iteration(at).total_s < plain.iteration(at).total_s

    low, high = (math.log10(rate) for rate in RATES_GBIT)
    points = [low + (high - low) * i / 24 for i in range(25)]
    if faster(10**high):
        return RATES_GBIT[1]
    below = next((point for point in reversed(points) if faster(10**point)), None)
    if below is None:
        return 0.0
    above = below + (high - low) / 24
    while above - below > 1e-4:
        middle = (below + above) / 2
        below, above = (middle, above) if faster(10**middle) else (below, middle)
    return float(10**below)
