"""Clusters by what their makers promise: links between machines, the bus inside them, and collectives over both.

GPUs of a machine share its link to the others. A ring that visits the machines one after another crosses each one's
link once in each direction, however many GPUs are inside, so it is as fast as its slowest link is for one rank. In an
all-to-all every GPU sends to every other one itself, and the link carries all of a machine's pieces.

Rates are nominal, of each direction. Latencies are those of a message between two programs where the link is idle: the
least that one takes.
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass

from llmsys.cost.links import Line


@dataclass(frozen=True, kw_only=True)
class Network:
    """A link by name: `gbit` is 10**9 bits a second."""

    title: str
    gbit: float
    latency_us: float
    source: str

    @property
    def line(self) -> Line:
        return Line(self.latency_us * 1e-6, 8e-9 / self.gbit)


_LARSEN = "Larsen et al., Int. J. Parallel Programming 37 (2009), 561: 10 us one way over TCP and 10 Gbit Ethernet"

NETWORKS = {
    "eth1g": Network(
        title="1GbE",
        gbit=1,
        latency_us=21,
        source=f"IEEE 802.3ab; {_LARSEN}, of which a frame of 1538 bytes is 1.2 us, and 12.3 us at 1 Gbit/s",
    ),
    "eth10g": Network(title="10GbE", gbit=10, latency_us=10, source=f"IEEE 802.3an; {_LARSEN}"),
    "ib100": Network(
        title="100Gb IB",
        gbit=100,
        latency_us=1,
        source="InfiniBand EDR, 4 lanes of 25 Gbit/s; below 1 us by ConnectX-5's brief, from memory",
    ),
}

INNER_LATENCY_US = 1.0
"""Of a message between GPUs of one machine."""


@dataclass(frozen=True, kw_only=True)
class Cluster:
    """`world` GPUs, `per_machine` of them in each machine: `inner` joins these, one `outer` link each machine with the
    others. ValueError unless machines are full; one that is not is alone."""

    inner: Line
    outer: Line
    world: int
    per_machine: int

    def __post_init__(self) -> None:
        if self.world > self.per_machine and self.world % self.per_machine:
            raise ValueError(f"task.worlds={self.world}: must be a multiple of task.per_machine={self.per_machine}")

    def seconds(self, kind: str, nbytes: float) -> float:
        """A collective over a tensor of `nbytes`, as `cost.links` counts it; 0 on one rank."""
        if self.world <= self.per_machine:
            return self.inner.seconds(kind, nbytes, self.world)
        links = [self.outer] if self.per_machine == 1 else [self.inner, self.outer]
        slowest = Line(max(link.alpha_s for link in links), max(link.beta_s for link in links))
        found = slowest.seconds(kind, nbytes, self.world)
        if kind != "all_to_all":
            return found
        elsewhere = (self.world - self.per_machine) / self.world
        latency = slowest.seconds(kind, 0, self.world)
        return max(found, latency + self.per_machine * elsewhere * nbytes * self.outer.beta_s)

    def at_rate(self, gbit: float) -> Cluster:
        """With links between machines of another rate, and the same latency."""
        return dataclasses.replace(self, outer=Line(self.outer.alpha_s, 8e-9 / gbit))
