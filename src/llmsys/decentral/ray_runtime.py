"""Providers as Ray actors, one for each unit of the resource `provider` that nodes have. What they say to the broker
goes by gRPC all the same: Ray starts them, watches their processes and starts them again. Only this file imports ray.

    ray start --address=HOST:PORT --resources='{"provider": 1}'

They are detached, so that a broker that is started again finds them; each ends when it is let go, or when no broker has
answered for `PATIENCE_S`. A process that has merely stopped Ray does not notice; the broker does.
"""

from __future__ import annotations

import logging
import os
import threading
import uuid
from dataclasses import asdict
from typing import Any

import ray
from ray.exceptions import RayError

from llmsys.decentral.fleet import Provider
from llmsys.decentral.reach import LOOPBACK
from llmsys.decentral.whereabouts import JobLost

RESOURCE = "provider"
PATIENCE_S = 60.0
NAMESPACE = "llmsys"
ANYWHERE = "auto"


class _Actor:
    """A provider's process. Ray runs `run` again in another one, as another life, when this one dies."""

    def __init__(self) -> None:
        self._alone = threading.Lock()

    def run(self, machine: dict[str, Any], address: str, token: str, certificate: bytes | None) -> str:
        """Until it is let go; why it was sent away, if it was. At once where another call is at it: it dials again."""
        if not self._alone.acquire(blocking=False):
            return ""
        try:
            return self._run(machine, address, token, certificate)
        finally:
            self._alone.release()

    def _run(self, machine: dict[str, Any], address: str, token: str, certificate: bytes | None) -> str:
        from llmsys.decentral.link import Credentials, Line, stay
        from llmsys.decentral.planes import plane_of
        from llmsys.decentral.provider import Provider as Work

        own = Provider(**machine)
        plane = plane_of(own.plane)
        plane.warm()
        work, life = Work(own.name, plane), uuid.uuid4().hex
        credentials = None if certificate is None else Credentials(certificate=certificate)
        stay(work, lambda: Line(address, token, own, life, credentials, busy=lambda: work.busy), lambda: PATIENCE_S)
        return work.why

    def pid(self) -> int:
        return os.getpid()


class Nodes:
    """Of the cluster at `address` (auto: this machine's, or RAY_ADDRESS's); `run`: whose providers they are. Leave its
    block, and those that are left end. ValueError where no cluster answers, or its nodes have too few `provider`."""

    def __init__(self, run: str, token: str, count: int, *, threads: int = 1, certificate: bytes | None = None,
                 address: str = ANYWHERE) -> None:  # fmt: skip
        self.run, self.token, self.threads, self.certificate = run, token, threads, certificate
        self.actors: dict[str, Any] = {}
        self._runs: dict[str, Any] = {}
        self._ours = not ray.is_initialized()
        if self._ours:
            where = os.environ.get("RAY_ADDRESS", ANYWHERE) if address == ANYWHERE else address
            try:
                ray.init(where, namespace=NAMESPACE, log_to_driver=False, logging_level=logging.ERROR)
            except (ConnectionError, RayError, ValueError, OSError) as error:
                first = (str(error).strip().splitlines() or [type(error).__name__])[0]
                raise ValueError(f"task.start=ray: {where}: {first}") from None
        there = int(ray.cluster_resources().get(RESOURCE, 0))
        if there < count:
            self.close()
            raise ValueError(
                f"task.providers={count}: the cluster's nodes have {there} of the resource {RESOURCE}; "
                f"ray start --resources='{{\"{RESOURCE}\": 1}}'"
            )

    def start(self, machine: Provider, address: str) -> None:
        """Returns at once. One that is there already, and waits for its broker, is left alone. ValueError where other
        machines' nodes could not dial that address."""
        hosts = {each["NodeManagerAddress"] for each in ray.nodes() if each["Alive"]}
        host = address.rpartition(":")[0]
        if len(hosts) > 1 and host in (*LOOPBACK, "0.0.0.0", "[::]"):
            raise ValueError(
                f"task.listen={host}: the cluster has other machines, which cannot dial that: this one's own"
            )
        variables = {"OMP_NUM_THREADS": str(self.threads), "MKL_NUM_THREADS": str(self.threads)}
        made = ray.remote(_Actor).options(
            name=f"{self.run}-{machine.name}",
            namespace=NAMESPACE,
            lifetime="detached",
            get_if_exists=True,
            num_cpus=0,
            resources={RESOURCE: 1},
            scheduling_strategy="SPREAD",
            max_restarts=-1,
            max_task_retries=-1,
            max_concurrency=2,
            runtime_env={"env_vars": variables},
        )
        actor = made.remote()
        self.actors[machine.name] = actor
        self._runs[machine.name] = actor.run.remote(asdict(machine), address, self.token, self.certificate)

    def pid(self, name: str) -> int:
        """Of the process that one is in now."""
        return int(ray.get(self.actors[name].pid.remote()))

    def wrong(self) -> dict[str, str]:
        """What ended badly, by name."""
        found = {}
        for name, future in self._runs.items():
            if ray.wait([future], timeout=0)[0]:
                try:
                    why = ray.get(future)
                except RayError as error:
                    why = str(error).strip().splitlines()[-1]
                if why:
                    found[name] = why
        return found

    def close(self) -> None:
        for each in self.actors.values():
            ray.kill(each)
        self.actors.clear()
        if self._ours:
            ray.shutdown()

    def __enter__(self) -> Nodes:
        return self

    def __exit__(self, kind: type[BaseException] | None, *error: object) -> None:
        """Of a broker that did not end as it should they are left, for one that is started again."""
        if kind is not None and not issubclass(kind, JobLost):
            self.actors.clear()
        self.close()
