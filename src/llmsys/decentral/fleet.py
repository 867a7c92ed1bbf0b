"""Providers as they are: unequal machines, what they may be trusted with, and the links between them.

A provider computes FLOPs / (efficiency x peak) seconds (FusionAI's lambda), and has one line out and one in, each of
which carries one message at a time (the bidirectional one-port model). A message of n bytes from p to q takes

    alpha + n beta seconds,  beta = 8 / min(up of p, down of q, what is between their regions)

of which n beta keep the lines busy; alpha passes while others are under way.
"""

from __future__ import annotations

import collections
import functools
import math
from collections.abc import Mapping
from dataclasses import dataclass, field

GIB = 2**30


@dataclass(frozen=True, kw_only=True)
class Provider:
    """`tflops`: peak, of which `efficiency` is reached. `mem_gib` of the device, `host_gib` of the host, which
    `host_gbps` (10**9 bytes a second) join. `up_mbit`, `down_mbit`: 10**6 bits a second. `trusted`: may see what a job
    keeps private. `usd_per_hour` and `watts`: of the whole machine at work, where known. `plane`: what computes there
    (`planes.PLANES`). ValueError, which names the provider, for what cannot be."""

    name: str
    tflops: float
    mem_gib: float
    up_mbit: float
    down_mbit: float
    efficiency: float = 0.5
    host_gib: float = 0.0
    host_gbps: float = 12.0
    region: str = ""
    trusted: bool = True
    usd_per_hour: float | None = None
    watts: float | None = None
    plane: str = "torch"

    def __post_init__(self) -> None:
        if not self.name:
            raise ValueError("a provider without a name")
        for key in ("tflops", "mem_gib", "up_mbit", "down_mbit", "host_gbps"):
            value = getattr(self, key)
            if value is None or not 0 < value < math.inf:
                raise ValueError(f"provider {self.name}: {key}={value}: must be a positive number")
        if not 0 < self.efficiency <= 1:
            raise ValueError(f"provider {self.name}: efficiency={self.efficiency}: must lie in (0, 1]")
        for key in ("host_gib", "usd_per_hour", "watts"):
            value = getattr(self, key)
            if value is not None and not 0 <= value < math.inf:
                raise ValueError(f"provider {self.name}: {key}={value}: must be 0 or more")

    @property
    def flops(self) -> float:
        """A second, as reached."""
        return self.efficiency * self.tflops * 1e12


@dataclass(frozen=True, kw_only=True)
class Between:
    """Two regions, or one with itself, in each direction: `delay_ms` one way, and the rate that a pair of providers
    reaches at most."""

    delay_ms: float = 0.0
    mbit: float = math.inf

    def __post_init__(self) -> None:
        if not 0 <= self.delay_ms < math.inf:
            raise ValueError(f"delay_ms={self.delay_ms}: must be 0 or more")
        if not self.mbit > 0:
            raise ValueError(f"mbit={self.mbit}: must be positive")


@dataclass(frozen=True, kw_only=True)
class Fleet:
    """`between`: by pair of regions, either way round; `other` for those that are not named. ValueError for two
    providers of one name, and for none at all."""

    providers: tuple[Provider, ...]
    between: Mapping[tuple[str, str], Between] = field(default_factory=dict)
    other: Between = field(default_factory=Between)

    def __post_init__(self) -> None:
        if not self.providers:
            raise ValueError("a fleet without providers")
        twice = [name for name, n in collections.Counter(each.name for each in self.providers).items() if n > 1]
        if twice:
            raise ValueError(f"provider {twice[0]}: is there twice")

    def __len__(self) -> int:
        return len(self.providers)

    def joint(self, p: int, q: int) -> Between:
        """What is between two providers, by place."""
        return self.between_regions(self.providers[p].region, self.providers[q].region)

    def between_regions(self, a: str, b: str) -> Between:
        """Of two regions that have providers."""
        return self._by_region[a, b]

    def alpha_s(self, p: int, q: int) -> float:
        return self.joint(p, q).delay_ms * 1e-3

    def beta_s(self, p: int, q: int) -> float:
        """Seconds a byte, from p to q."""
        sender, receiver = self.providers[p], self.providers[q]
        return 8e-6 / min(sender.up_mbit, receiver.down_mbit, self.joint(p, q).mbit)

    @functools.cached_property
    def _by_region(self) -> dict[tuple[str, str], Between]:
        regions = {each.region for each in self.providers}
        both = {**{(b, a): each for (a, b), each in self.between.items()}, **self.between}
        return {(a, b): both.get((a, b), self.other) for a in regions for b in regions}
