"""How long ranks take to talk: the alpha-beta model of a link, and the collectives over it.

A message of n bytes takes alpha + n beta seconds (Hockney, 1994): alpha is latency, beta the inverse of the rate. With
p ranks and n bytes of the whole tensor (what is reduced or broadcast, the gathered result, the input that is scattered;
Thakur, Rabenseifner and Gropp, "Optimization of Collective Communication Operations in MPICH", 2005):

                      ring                                    tree (binomial)
    reduce_scatter    (p-1) alpha + (p-1)/p n beta            -
    all_gather        (p-1) alpha + (p-1)/p n beta            -
    all_reduce        2(p-1) alpha + 2 (p-1)/p n beta         2 ceil(log2 p) (alpha + n beta)
    broadcast         (p-1) alpha + n beta                    ceil(log2 p) (alpha + n beta)

The factor before n beta is also what NCCL's tests divide by for the bus bandwidth: the share of the tensor that
crosses each rank's link. Ranks send and receive at once, so an asymmetric link is as fast as its slower direction.
Arithmetic of the reduction itself is in beta, where it was fitted.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from llmsys import schema

RING = {"reduce_scatter": (1, 1), "all_gather": (1, 1), "all_reduce": (2, 2), "broadcast": (1, 0)}
RING["all_to_all"] = (1, 1)  # each piece straight to its rank
"""Collective -> how many times p-1 messages one after another, and how many times (p-1)/p of the tensor (0: all)."""

TREE = {"all_reduce": 2, "broadcast": 1}
"""Collective -> how many times it goes through the tree, whole."""


def bus_factor(kind: str, world: int) -> float:
    """Bytes that each rank sends in a ring, over the bytes of the tensor; 0 on one rank."""
    _known(kind, RING)
    if world == 1:
        return 0.0
    return RING[kind][1] * (world - 1) / world or 1.0


def steps(kind: str, world: int, algorithm: str = "ring") -> int:
    """Messages one after another."""
    if algorithm == "ring":
        _known(kind, RING)
        return RING[kind][0] * (world - 1)
    assert algorithm == "tree", algorithm
    _known(kind, TREE)
    return TREE[kind] * math.ceil(math.log2(world))


def volume(kind: str, world: int, algorithm: str = "ring") -> float:
    """Bytes that pass one link one after another, over the bytes of the tensor."""
    return bus_factor(kind, world) if algorithm == "ring" else float(steps(kind, world, "tree"))


@dataclass(frozen=True)
class Line:
    """The link of each rank: `alpha_s` seconds a message, `beta_s` seconds a byte."""

    alpha_s: float
    beta_s: float

    @classmethod
    def of_network(cls, network: schema.Network, latency_s: float = 0.0) -> Line:
        """A shaped network's; `latency_s` is what software and wire take of themselves. ValueError without rates."""
        if network.up_mbit is None or network.down_mbit is None:
            raise ValueError("network.up_mbit: missing; a prediction needs the link's rates, e.g. network=eth1g")
        slower = min(network.up_mbit, network.down_mbit)
        return cls(latency_s + network.delay_ms * 1e-3, 8 / (slower * 1e6))

    @classmethod
    def of_rate(cls, gbps: float, latency_s: float = 0.0) -> Line:
        """A link inside a machine; `gbps` is 10**9 bytes a second in each direction."""
        return cls(latency_s, 1e-9 / gbps)

    def seconds(self, kind: str, nbytes: float, world: int, algorithm: str = "ring") -> float:
        """A collective of `world` ranks over a tensor of `nbytes`; 0 on one rank. ValueError for an unknown kind."""
        return steps(kind, world, algorithm) * self.alpha_s + volume(kind, world, algorithm) * nbytes * self.beta_s

    def best(self, kind: str, nbytes: float, world: int) -> tuple[float, str]:
        """(seconds, algorithm): the faster of ring and tree, which libraries choose by size as well."""
        algorithms = ["ring", "tree"] if kind in TREE else ["ring"]
        return min((self.seconds(kind, nbytes, world, algorithm), algorithm) for algorithm in algorithms)


@dataclass(frozen=True)
class Machines:
    """Equal machines of `per_machine` ranks: `inner` links within each, one `outer` link from each to the others."""

    inner: Line
    outer: Line
    per_machine: int

    def all_reduce(self, nbytes: float, world: int) -> float:
        """Scatter within, all-reduce of each piece between, gather within; all pieces share the machine's outer link.

        ValueError unless `world` is a multiple of `per_machine`.
        """
        if world % self.per_machine:
            raise ValueError(f"train.world={world}: must be a multiple of the {self.per_machine} ranks of a machine")
        within = self.inner.seconds("reduce_scatter", nbytes, self.per_machine)
        within += self.inner.seconds("all_gather", nbytes, self.per_machine)
        return within + self.outer.seconds("all_reduce", nbytes, world // self.per_machine)


def fit(
    sizes: Sequence[float],
    seconds: Sequence[float],
    *,
    kind: str = "all_reduce",
    world: int = 2,
    algorithm: str = "ring",
) -> Line:
    """The line by which a collective over tensors of `sizes` bytes took `seconds`; relative least squares.

    Each residual is divided by its measurement: the sizes span decades, and without that only the largest would count.
    A negative alpha (noise) becomes 0 and beta is fitted alone. ValueError for fewer than two different sizes.
    """
    if len(set(sizes)) < 2 or len(sizes) != len(seconds) or min(seconds) <= 0 or world < 2:
        raise ValueError(f"{len(sizes)} sizes, {len(seconds)} times: a fit needs two sizes, times > 0 and two ranks")
    weights = [1 / t**2 for t in seconds]
    total = sum(weights)
    mean_n = sum(w * n for w, n in zip(weights, sizes, strict=True)) / total
    mean_t = sum(w * t for w, t in zip(weights, seconds, strict=True)) / total
    spread = sum(w * (n - mean_n) ** 2 for w, n in zip(weights, sizes, strict=True))
    slope = sum(w * (n - mean_n) * t for w, n, t in zip(weights, sizes, seconds, strict=True)) / spread
    intercept = mean_t - slope * mean_n
    if intercept < 0:
        squares = sum(w * n * n for w, n in zip(weights, sizes, strict=True))
        slope = sum(w * n * t for w, n, t in zip(weights, sizes, seconds, strict=True)) / squares
        intercept = 0.0
    return Line(intercept / steps(kind, world, algorithm), slope / volume(kind, world, algorithm))


def _known(kind: str, table: Mapping[str, object]) -> None:
    if kind not in table:
        raise ValueError(f"{kind}: not one of the collectives {', '.join(table)}")
