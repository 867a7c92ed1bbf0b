"""Four nodes on this machine, each with two cores that Ray gives away once: what several machines would be."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

from llmsys.dispatch.cluster import ALONE, ALWAYS

SETTINGS = {**ALONE, **ALWAYS}


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
def emulated(nodes: int = 4, **more: Any) -> Iterator[Emulated]:
    """`more`: of the first node, as `ray.cluster_utils` takes it."""
    before = {key: os.environ.get(key) for key in SETTINGS}
    os.environ.update(SETTINGS)
    from ray.cluster_utils import Cluster

    head = {"num_cpus": 2, "resources": {"node0": 100}, "node_name": "node0", "include_dashboard": False, **more}
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


@contextmanager
def apart(**more: Any) -> Iterator[str]:
    """The address of a cluster of one node in a process of its own, which ends with this one: what Ray leaves open when
    it starts a dashboard is not this process's."""
    command = [sys.executable, __file__, json.dumps(more)]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdin is not None
        assert process.stdout is not None
        said = [line.strip() for line in iter(process.stdout.readline, "") if line.startswith("address ")][:1]
        try:
            yield said[0].split()[1]
        finally:
            process.stdin.close()
            process.wait(30)


if __name__ == "__main__":
    with emulated(1, **json.loads(sys.argv[1])) as made:
        print("address", made.cluster.address, flush=True)
        os.close(1)  # whoever reads has what there is
        sys.stdin.read()
