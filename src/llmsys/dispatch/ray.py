"""Runs a job on the nodes of a Ray cluster that have what it needs; the only file here that imports ray.

    driver                       a node
    Follower <- RemoteRank  <->  _Actor (a Keeper)  <->  the rank's process     one of these for each rank

Ray places the ranks of a run, all or none of them (a placement group), and says when a worker or a node is gone. What
happens in between is the same as on one machine: the rank is a process of its own, its signs of life pass through its
keeper, and deadlines are the driver's. An actor serves one rank and ends with it, so no worker is used twice. When the
driver dies, Ray ends its actors, and each of their processes goes with its keeper.
"""

from __future__ import annotations

import contextlib
import functools
import json
import logging
import os
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import ray
from ray.exceptions import GetTimeoutError, RayError, RayTaskError
from ray.util.placement_group import PlacementGroup, placement_group, remove_placement_group
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy, PlacementGroupSchedulingStrategy

from llmsys import job as jobs
from llmsys.dispatch import ending, memory_limit
from llmsys.dispatch.follow import Follower
from llmsys.dispatch.keeper import Keeper
from llmsys.dispatch.links import Unshaped
from llmsys.dispatch.needs import Need, Node
from llmsys.dispatch.remote import KILL_S, Lost, RemoteRank
from llmsys.dispatch.stop import Stop
from llmsys.job import Job, Record

LOOK_S = 0.5
"""Between two looks whether there is room, or whether somebody wants to stop."""
PATIENCE_S = 3.0
"""How long a run waits for room before it is said: Ray itself needs a moment to place it."""
NOTICED_S = 5.0
"""How long after a worker its node may be found to be gone."""
SURVEY_S = 60.0
"""How long a node may take to say what it is: a worker starts there, and on a GPU's host torch is loaded."""
Progress = Callable[[dict[str, Any]], None]


def connect(address: str | None, threads: int) -> None:
    """To a cluster, or with None to one that RAY_ADDRESS names; else one is started here, on loopback. ValueError
    where none answers."""
    ours = address is None and not os.environ.get("RAY_ADDRESS")
    local = {"address": "local", "num_cpus": threads, "include_dashboard": False}
    more: dict[str, Any] = local if ours else {"address": address}
    ours_to_hear = signal.getsignal(signal.SIGTERM)
    try:
        with _group_of_its_own() if ours else contextlib.nullcontext():
            ray.init(log_to_driver=False, logging_level=logging.ERROR, **more)
    except (ConnectionError, RuntimeError, RayError, ValueError, OSError) as error:
        lines = str(error).strip().splitlines() or [type(error).__name__]
        raise ValueError(f"dispatch.address={address or os.environ.get('RAY_ADDRESS')}: {lines[0]}") from None
    finally:
        if threading.current_thread() is threading.main_thread():
            signal.signal(signal.SIGTERM, ours_to_hear)  # Ray's own would end this process with its runs as they are


@contextlib.contextmanager
def _group_of_its_own() -> Iterator[None]:
    """What is started within the block is in another process group: a signal to this one's, as of `timeout`, is to end
    runs between two steps, and not the cluster that they are on. A session's leader has to stay in its own."""
    before = os.getpgrp()
    with subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE, process_group=0) as leader:
        with contextlib.suppress(PermissionError):
            os.setpgid(0, leader.pid)
        try:
            yield
        finally:
            with contextlib.suppress(PermissionError):
                os.setpgid(0, before)
            leader.kill()


def disconnect() -> None:
    """And the end of a cluster that was started here."""
    ray.shutdown()


def nodes() -> list[Node]:
    """Those that are alive."""
    return [
        Node(
            id=each["NodeID"],
            name=each["NodeName"] if each["NodeName"] != each["NodeManagerAddress"] else each["NodeManagerHostname"],
            address=each["NodeManagerAddress"],
            port=each["NodeManagerPort"],
            resources=each["Resources"],
        )
        for each in ray.nodes()
        if each["Alive"]
    ]


def survey(asked: Path, which: Sequence[Node]) -> Iterator[tuple[Node, dict[str, Any]]]:
    """What each node says of itself (`llmsys.dispatch.node`), as it comes. ValueError for one that does not, or where
    this package is not installed."""
    task = ray.remote(num_cpus=0, max_retries=0, max_calls=1)(_asked)
    refs = {}
    for node in which:
        there = NodeAffinitySchedulingStrategy(node.id, soft=False)
        refs[task.options(scheduling_strategy=there).remote(str(asked))] = node
    deadline, left = time.monotonic() + SURVEY_S, list(refs)
    while left:
        ready, left = ray.wait(left, timeout=max(0.0, deadline - time.monotonic()))
        if not ready:
            raise ValueError(f"dispatch=ray: node {refs[left[0]]} has not answered in {SURVEY_S:.0f} s")
        node = refs[ready[0]]
        try:
            said = ray.get(ready[0])
        except RayError as error:
            raise ValueError(f"dispatch=ray: node {node}: {_line(error)}") from None
        if "machine" not in said:
            raise ValueError(f"dispatch=ray: node {node}: llmsys does not run there: {said['error']}")
        yield node, said


def _asked(asked: str) -> dict[str, Any]:
    """In a process of its own, which sees the node's GPUs: Ray hides them from one that has asked for none."""
    env = {key: value for key, value in os.environ.items() if key != "CUDA_VISIBLE_DEVICES" or value}
    words = [sys.executable, "-m", "llmsys.dispatch.node", asked]
    done = subprocess.run(words, env=env, capture_output=True, text=True, timeout=SURVEY_S)
    if done.returncode:
        return {"error": (done.stderr.strip().splitlines() or [f"exit code {done.returncode}"])[-1]}
    said: dict[str, Any] = json.loads(done.stdout)
    return said


class _Actor(Keeper):
    def place(self) -> dict[str, Any]:
        """Where it is."""
        context = ray.get_runtime_context()
        gpus = bool(context.get_accelerator_ids().get("GPU"))
        address = ray.util.get_node_ip_address()
        node, worker = context.get_node_id(), os.getpid()
        return {"node": node, "address": address, "gpus": gpus, "worker": worker, "code": jobs.code_hash()}


def run(job: Job, progress: Progress, lock: int, stop: Stop | None = None) -> Record:
    """The job's record, always. `stop`: of other threads than the main one, which hears no signal.

    A run whose node or worker is lost is begun again `dispatch.retries` times; its checkpoints are on the shared path.
    """
    stop, tries = stop or Stop(), 1 + job.config["dispatch"]["retries"]
    while True:
        attempt = jobs.previous_attempts(Path(job.out)) + 1
        record, taken = _attempt(job, attempt, progress, stop)
        tries -= 1
        if not (taken and tries) or stop.asked:
            return record
        progress({"phase": "begun again", "say": f"begun again: {record.error}"})


def _attempt(job: Job, attempt: int, progress: Progress, stop: Stop) -> tuple[Record, bool]:
    """(the record, whether the run ended since a node or a worker was taken away)."""
    need, start = Need.of(job.config), time.monotonic()
    overrule, taken, asked, sent = False, False, False, ""
    group = placement_group(need.bundles, strategy=need.strategy)
    try:
        _wait_for_room(group, need, progress, stop)
        start = time.monotonic()
        with _ranks(job, need, group, stop) as (ranks, places):
            follower = Follower(job, ranks, progress, Unshaped(job, ranks, places), start, stop)
            verdict = follower.follow() or follower.cause()
            overrule, asked, sent = follower.overrules, follower.asked, ranks[0].record
            taken = any(rank.lost for rank in ranks) or (verdict[0] == "interrupted" and not asked)
    except Lost as error:
        verdict, taken = ("crashed", error.reason, str(error)), True
    except RayError as error:
        verdict = ("failed", "start", _line(error))
    finally:
        remove_placement_group(group)
    record = ending.write(job, attempt, verdict, time.monotonic() - start, overrule=overrule, sent=sent)
    if said := memory_limit.ignored(job.config):
        record.notes[memory_limit.NOTE] = said
        record.write(Path(job.out))
    if asked:
        raise KeyboardInterrupt
    return record, taken


def _wait_for_room(group: PlacementGroup, need: Need, progress: Progress, stop: Stop) -> None:
    """Until Ray has placed all ranks. Lost where the nodes that are left will never have room."""
    said, begun = False, time.monotonic()
    while not group.wait(timeout_seconds=LOOK_S):
        if stop.asked:
            raise KeyboardInterrupt
        if need.runs(nodes()) < 1:
            raise Lost("node", f"the nodes that are alive do not have what a run needs: {need}")
        if not said and time.monotonic() > begun + PATIENCE_S:
            progress({"phase": "waiting for room", "say": "waiting for room"})
            said = True
    if said:
        progress({"phase": "starting", "say": "has room now"})


@contextlib.contextmanager
def _ranks(
    job: Job, need: Need, group: PlacementGroup, stop: Stop
) -> Iterator[tuple[list[RemoteRank], list[dict[str, Any]]]]:
    """(the ranks, started; what each is told of its machine). All are gone at the end."""
    more = dict(need.rank)
    wanted = {"num_cpus": more.pop("CPU", 0), "num_gpus": more.pop("GPU", 0), "memory": more.pop("memory", None)}
    actor = ray.remote(max_restarts=0, max_task_retries=0, max_concurrency=4, resources=more, **wanted)(_Actor)
    actors: list[Any] = []
    ranks: list[RemoteRank] = []
    over = threading.Event()
    try:
        for rank in range(need.world):
            bundle = rank * len(need.bundles) // need.world
            place = PlacementGroupSchedulingStrategy(group, placement_group_bundle_index=bundle)
            actors.append(actor.options(scheduling_strategy=place).remote(asdict(job), rank))
        limit = time.monotonic() + job.config["dispatch"]["start_s"]
        places = _all(actors, "place", limit, stop)
        if any(each["code"] != jobs.code_hash() for each in places):  # of a node that came after all were asked
            raise Lost("node", "a node has other code of llmsys than this; install the same there")
        _all(actors, "start", limit, stop)
        there = {node.id: node for node in nodes()}
        own = [there.get(each["node"], Node(id=each["node"], name=each["node"], address="")) for each in places]
        asks = [functools.partial(_ask, each, node, over) for each, node in zip(actors, own, strict=True)]
        ranks += [RemoteRank(rank, ask) for rank, ask in enumerate(asks)]
        yield ranks, _told(places, own)
    finally:
        over.set()
        ended = [each.kill.remote() for each in actors]
        ray.wait(ended, num_returns=len(ended), timeout=KILL_S) if ended else None
        for each in actors:
            ray.kill(each)
        for one in ranks:
            one.close()


def _told(places: Sequence[dict[str, Any]], own: Sequence[Node]) -> list[dict[str, Any]]:
    """What each rank is told of its machine, as `worker` takes it: its address where they are on several."""
    names, workers = sorted({node.name for node in own}), [each["worker"] for each in places]
    env = {"dispatch": {"kind": "ray", "ray": ray.__version__, "nodes": names, "workers": workers}}
    several = len({each["address"] for each in places}) > 1
    return [
        {"env": env, "device": 0 if each["gpus"] else None, **({"address": each["address"]} if several else {})}
        for each in places
    ]


def _all(actors: Sequence[Any], method: str, limit: float, stop: Stop) -> list[Any]:
    """What a method of each returns. Lost where one is gone, or has not answered by `limit`."""
    refs = [getattr(each, method).remote() for each in actors]
    left = refs
    while left:
        if stop.asked:
            raise KeyboardInterrupt
        if time.monotonic() > limit:
            raise Lost("worker", f"rank {refs.index(left[0])} has not started in dispatch.start_s")
        left = ray.wait(left, num_returns=len(left), timeout=LOOK_S)[1]
    return [_got(ref) for ref in refs]


def _ask(
    actor: Any, node: Node, ending: threading.Event, method: str, *given: Any, timeout_s: float | None = None
) -> Any:
    """`remote.Ask`, of an actor on this node, until `ending` is set. A worker that is gone may have gone with its node,
    which Ray may notice a little later."""
    try:
        return _got(getattr(actor, method).remote(*given), timeout_s)
    except Lost as error:
        deadline = time.monotonic() + NOTICED_S
        while any(each.id == node.id for each in nodes()) and _listens(node):
            if time.monotonic() > deadline or ending.wait(LOOK_S):
                raise Lost("worker", f"node {node.name}: {error}") from None
        raise Lost("node", f"node {node.name} died: {error}") from None


def _listens(node: Node) -> bool:
    """False of a node that is gone: Ray itself misses it only after several of its health checks (15 s and more)."""
    try:
        socket.create_connection((node.address, node.port), timeout=NOTICED_S).close()
    except ConnectionRefusedError:
        return False
    except OSError:
        pass  # not to be reached from here, which says nothing
    return True


def _got(ref: Any, timeout_s: float | None = None) -> Any:
    try:
        return ray.get(ref, timeout=timeout_s)
    except GetTimeoutError as error:
        raise TimeoutError(str(error)) from None
    except RayTaskError:
        raise
    except RayError as error:
        raise Lost("worker", _line(error)) from None


def _line(error: Exception) -> str:
    """Its cause in a line."""
    cause = getattr(error, "cause", None) or error
    lines = [line.strip() for line in str(cause).splitlines() if line.strip()]
    return f"{type(cause).__name__}: {lines[0] if lines else ''}"
