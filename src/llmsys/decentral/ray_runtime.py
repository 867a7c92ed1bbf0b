"""Providers as Ray actors, one for each unit of the resource `provider` that nodes have. What they say to the broker
goes by gRPC all the same: Ray starts them, watches their processes and starts them again. Only this file imports ray.

    ray start --address=HOST:PORT --resources='{"provider": 1}'

They are detached, so that a broker that is started again finds them. Each ends, and its part of the resource is free
again, when it is let go, or when no broker has answered for `PATIENCE_S`; those of a broker that ends with an error are
killed, since nobody begins that one again. A process that has merely stopped Ray does not notice; the broker does.
"""

from __future__ import annotations

import logging
import os
import threading
import time
import uuid
from dataclasses import asdict
from typing import Any

import ray
from ray.exceptions import RayActorError, RayError

from llmsys.decentral.fleet import Provider
from llmsys.decentral.reach import LOOPBACK

RESOURCE = "provider"
PATIENCE_S = 60.0
FREE_S = 5.0
"""For what an earlier run's had to be free again: Ray hears of it a moment after they have ended."""
LOOK_S = 0.2
NAMESPACE = "llmsys"
ANYWHERE = "auto"


class _Actor:
    """A provider's process. Ray runs `run` again in another one, as another life, when this one dies. Calls are done
    one by one, but for those of `awaited` and `pid`. It ends where nobody has called for `patience_s`: Ray starts it
    again also when whoever would call is dead."""

    def __init__(self, patience_s: float) -> None:
        self.patience_s = patience_s
        self._itself = ray.get_runtime_context().current_actor
        self._called = False
        self._awaited = 0
        self._why: str | None = None
        timer = threading.Timer(patience_s, self._nobody_calls)
        timer.daemon = True
        timer.start()

    def run(self, machine: dict[str, Any], address: str, token: str, certificate: bytes | None) -> str:
        """Until it is let go; why it was sent away, if it was. Then the actor ends. A broker that is started again
        calls while the first call is at it, which dials again; its own is answered after that, by the same word."""
        self._called = True
        try:
            if self._why is None:
                self._why = self._run(machine, address, token, certificate)
            return self._why
        finally:
            self._awaited -= 1
            self._itself.end.remote()  # not here: what this call returns would be lost

    @ray.method(max_task_retries=0)
    def end(self) -> None:
        """As it wishes to, so that Ray does not start it again. Not where a call of `run` is on its way: where one ends
        with calls in its queue Ray tries these again and again, and its part of the resource is not free."""
        if self._awaited <= 0:
            ray.actor.exit_actor()

    @ray.method(concurrency_group="beside")
    def awaited(self) -> None:
        """Said before `run` is called."""
        self._awaited += 1

    def _nobody_calls(self) -> None:
        if not self._called:
            self._itself.end.remote()

    def _run(self, machine: dict[str, Any], address: str, token: str, certificate: bytes | None) -> str:
        from llmsys.decentral.link import Credentials, Line, stay
        from llmsys.decentral.planes import plane_of
        from llmsys.decentral.provider import Provider as Work

        own = Provider(**machine)
        plane = plane_of(own.plane)
        plane.warm()
        work, life = Work(own.name, plane), uuid.uuid4().hex
        credentials = None if certificate is None else Credentials(certificate=certificate)

        def dial() -> Line:
            return Line(address, token, own, life, credentials, busy=lambda: work.busy)

        stay(work, dial, lambda: self.patience_s)
        return work.why

    @ray.method(concurrency_group="beside")
    def pid(self) -> int:
        return os.getpid()


class Nodes:
    """Of the cluster at `address` (auto: this machine's, or RAY_ADDRESS's); `run`: whose providers they are. Leave its
    block, and those that are left end. ValueError where no cluster answers, or its nodes have too few `provider`, or
    too few that no other run has taken."""

    def __init__(self, run: str, token: str, count: int, *, threads: int = 1, certificate: bytes | None = None,
                 address: str = ANYWHERE) -> None:  # fmt: skip
        self.run, self.token, self.threads, self.certificate = run, token, threads, certificate
        self.actors: dict[str, Any] = {}
        self._runs: dict[str, Any] = {}
        self._left: dict[str, tuple[Provider, str]] = {}  # by an earlier broker; how they are started
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
        deadline = time.monotonic() + FREE_S
        while (ours := int(ray.available_resources().get(RESOURCE, 0)) + len(self._there())) < count:
            if time.monotonic() > deadline:
                self.close()
                raise ValueError(
                    f"task.providers={count}: the cluster's nodes have {there} of the resource {RESOURCE}, and other "
                    f"runs all but {ours} of them; where a broker was stopped or killed its own end within "
                    f"{PATIENCE_S:.0f} s"
                )
            time.sleep(LOOK_S)

    def _there(self) -> set[str]:
        """Names of this run's actors, which an earlier broker has left."""
        every = ray.util.list_named_actors(all_namespaces=True)
        names = {each["name"] for each in every if each["namespace"] == NAMESPACE}
        return {each for each in names if each.startswith(f"{self.run}-")}

    def start(self, machine: Provider, address: str) -> None:
        """Returns at once. One that is there already, and waits for its broker, is left alone. ValueError where other
        machines' nodes could not dial that address."""
        hosts = {each["NodeManagerAddress"] for each in ray.nodes() if each["Alive"]}
        host = address.rpartition(":")[0]
        if len(hosts) > 1 and host in (*LOOPBACK, "0.0.0.0", "[::]"):
            raise ValueError(
                f"task.listen={host}: the cluster has other machines, which cannot dial that: this one's own"
            )
        own = f"{self.run}-{machine.name}"
        if own in self._there():
            self._left[machine.name] = machine, address
        variables = {"OMP_NUM_THREADS": str(self.threads), "MKL_NUM_THREADS": str(self.threads)}
        made = ray.remote(concurrency_groups={"beside": 1})(_Actor).options(
            name=own,
            namespace=NAMESPACE,
            lifetime="detached",
            get_if_exists=True,
            num_cpus=0,
            resources={RESOURCE: 1},
            scheduling_strategy="SPREAD",
            max_restarts=-1,
            max_task_retries=-1,
            runtime_env={"env_vars": variables},
        )
        actor = made.remote(PATIENCE_S)
        self.actors[machine.name] = actor
        actor.awaited.remote()
        self._runs[machine.name] = actor.run.remote(asdict(machine), address, self.token, self.certificate)

    def again(self) -> None:
        """To be called now and then: one that an earlier broker has left, and that was just ending when it was found,
        is started anew."""
        for name, given in list(self._left.items()):
            if ray.wait([self._runs[name]], timeout=0)[0]:
                del self._left[name]
                try:
                    ray.get(self._runs[name])
                except RayActorError:
                    self.start(*given)
                except RayError:
                    continue  # `wrong` says it

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
        """Of a broker that was stopped they are left, for a while: `dispatch=ray` begins it again, as it does one that
        was killed, unless the user has stopped it, and who did is not known here. After an error nobody does."""
        if kind is not None and not issubclass(kind, Exception):
            self.actors.clear()
        self.close()
