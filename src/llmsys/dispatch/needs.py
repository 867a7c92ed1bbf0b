"""What a run needs of a cluster, and whether there is as much: pure functions on what the nodes say they have.

A multi-rank run asks for a bundle of resources for each rank, wherever there is room (`dispatch.nodes=0`), or for a
bundle for each of so many nodes, which its ranks share.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

GIB = 2**30
Resources = Mapping[str, float]


@dataclass(frozen=True, kw_only=True)
class Node:
    """A node that is alive. `port`: where its own service listens. `resources` by Ray's names: CPU, GPU, memory (bytes)
    and its own."""

    id: str
    name: str
    address: str
    port: int = 0
    resources: Resources = field(default_factory=dict)

    def __str__(self) -> str:
        own = {key: value for key, value in sorted(self.resources.items()) if not key.startswith(("node:", "object_"))}
        parts = [f"{value / GIB:.1f} GiB" if key == "memory" else f"{value:g} {key}" for key, value in own.items()]
        return f"{self.name} ({self.address}): {', '.join(parts) or 'nothing'}"


@dataclass(frozen=True, kw_only=True)
class Need:
    """`world` ranks, each with `rank`, over `nodes` nodes; 0: over as few as there is room on."""

    world: int
    rank: Resources
    nodes: int = 0

    @classmethod
    def of(cls, config: Mapping[str, Any]) -> Need:
        """Of a composed or a resolved config. A rank has a core for each of its threads, and a GPU where it is to run
        on one, unless said otherwise."""
        given, world = config["dispatch"], config["train"]["world"]
        cpus, gpus = given["cpus"], given["gpus"]
        rank = {
            **given["resources"],
            "CPU": max(1, config["train"]["threads"]) if cpus is None else cpus,
            "GPU": float(config["hardware"]["device"] == "cuda") if gpus is None else gpus,
            "memory": (given["memory_gib"] or 0.0) * GIB,
        }
        return cls(world=world, nodes=given["nodes"], rank={key: value for key, value in rank.items() if value})

    @property
    def bundles(self) -> list[dict[str, float]]:
        """One for each rank, or for each node."""
        count, ranks = (self.nodes, self.world // self.nodes) if self.nodes else (self.world, 1)
        return [{key: value * ranks for key, value in self.rank.items()} for _ in range(count)]

    @property
    def strategy(self) -> str:
        """Ray's, of a placement group."""
        return "STRICT_SPREAD" if self.nodes else "PACK"

    def runs(self, nodes: Sequence[Node]) -> int:
        """How many such runs all these nodes together have room for, if nothing else runs on them."""
        bundle = self.bundles[0]
        room = [min((_times(node.resources, key, value) for key, value in bundle.items()), default=0) for node in nodes]
        if not self.nodes:
            return sum(room) // self.world
        count = sum(room) // self.nodes
        while count and sum(min(each, count) for each in room) < count * self.nodes:
            count -= 1
        return count

    def __str__(self) -> str:
        parts = [
            f"dispatch.memory_gib={value / GIB:g}" if key == "memory" else f"{value:g} {key}"
            for key, value in self.rank.items()
        ]
        over = f" over dispatch.nodes={self.nodes}" if self.nodes else ""
        ranks = f"train.world={self.world} ranks{over}, each with " if self.world > 1 else ""
        return ranks + ", ".join(parts)


def _times(resources: Resources, key: str, value: float) -> int:
    return math.floor(resources.get(key, 0.0) / value + 1e-9)


def check(need: Need, nodes: Sequence[Node]) -> None:
    """ValueError, with what each node has, where no such run has room on all of them."""
    if need.runs(nodes) < 1:
        there = "".join(f"\n  {node}" for node in nodes) or "\n  no node is alive"
        raise ValueError(f"dispatch=ray: a run needs {need}, and the cluster does not have that:{there}")


def eligible(need: Need, nodes: Sequence[Node]) -> list[Node]:
    """Those that a rank has room on."""
    return [node for node in nodes if min((_times(node.resources, k, v) for k, v in need.rank.items()), default=1)]
