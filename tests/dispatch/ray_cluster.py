"""Four nodes on this machine, each with two cores that Ray gives away once: what several machines would be."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

SETTINGS = {
    "RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER": "0",  # all on loopback
    "RAY_USAGE_STATS_ENABLED": "0",
    "RAY_AUTH_MODE": "disabled",  # else it writes a token into the home folder
    "RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO": "0",
}


@dataclass
class Emulated:
    """`cluster`: of `ray.cluster_utils`; its processes end with this one."""

    cluster: Any

    @property
    def words(self) -> tuple[str, ...]:
        """Of a command line that runs on it."""
        return "dispatch=ray", f"dispatch.address={self.cluster.address}"

    def add(self, name: str) -> None:
        """A node, which alone has the resource `name`."""
        self.cluster.add_node(num_cpus=2, resources={name: 100}, node_name=name)
        self.cluster.wait_for_nodes()

    def kill(self, name: str) -> None:
        """A node, but the first, with all that runs there."""
        (node,) = (each for each in self.cluster.worker_nodes if each._ray_params.node_name == name)
        self.cluster.remove_node(node, allow_graceful=False)


@contextmanager
def emulated(nodes: int = 4) -> Iterator[Emulated]:
    before = {key: os.environ.get(key) for key in SETTINGS}
    os.environ.update(SETTINGS)
    from ray.cluster_utils import Cluster

    head = {"num_cpus": 2, "resources": {"node0": 100}, "node_name": "node0", "include_dashboard": False}
    cluster = Cluster(initialize_head=True, head_node_args=head)
    try:
        made = Emulated(cluster)
        for number in range(1, nodes):
            made.add(f"node{number}")
        yield made
    finally:
        cluster.shutdown()
        for key, value in before.items():
            os.environ.pop(key) if value is None else os.environ.update({key: value})
