"""Runs a job as one of the ranks that torchrun has started: this process is one, and the others do the same.

torchrun says in the environment which rank this is, and serves the store at which all of them meet; it starts them and
ends them all when one fails. Rank 0 speaks and writes for all.
"""

from __future__ import annotations

import os
import signal
import socket
import threading
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict
from types import FrameType
from typing import Any

from llmsys import runner, schema
from llmsys.comm.place import Place, interface_of, listen
from llmsys.context import LightContext
from llmsys.dispatch import memory_limit
from llmsys.dispatch.stop import Stop
from llmsys.job import Job, Record

NAMES = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT")


def check(configs: Sequence[Mapping[str, Any]]) -> None:
    """ValueError where `dispatch=torchrun` is asked for in a process that torchrun has not started, or for more than
    the one run that it has started these ranks for."""
    own = [each for each in configs if each["dispatch"].get("kind") == "torchrun"]
    if not own:
        return
    missing = [name for name in NAMES if name not in os.environ]
    if missing:
        raise ValueError(f"dispatch=torchrun: {missing[0]} is not set; start it with: bash jobs/torchrun.sh +exp=NAME")
    swept = own[0].get("sweep", {}) not in ({}, asdict(schema.Sweep())) or own[0].get("search", {}).get("trials")
    if len(configs) > 1 or swept:
        raise ValueError("dispatch=torchrun: is one run; a sweep or a search needs dispatch=process or dispatch=ray")
    world, there = own[0]["train"]["world"], int(os.environ["WORLD_SIZE"])
    if world != there:
        raise ValueError(f"train.world={world}: torchrun has started {there} ranks; they must be as many")


def silent(config: Mapping[str, Any]) -> bool:
    """Whether this process is a rank that another one speaks for."""
    return config["dispatch"].get("kind") == "torchrun" and os.environ["RANK"] != "0"


def run(job: Job, progress: Callable[[dict[str, Any]], None], lock: int, stop: Stop | None = None) -> Record:
    """The run's record, of every rank its own; rank 0's is the one on disk."""
    memory_limit.set_here(job.config)
    seen: list[LightContext] = []

    def end(number: int, frame: FrameType | None) -> None:
        if seen and seen[0].stoppable:
            seen[0].stop_asked = True
        else:
            raise KeyboardInterrupt

    if threading.current_thread() is threading.main_thread():
        for number in (signal.SIGINT, signal.SIGTERM):
            signal.signal(number, end)
    return runner.run(job, progress, seen.append, place=place())


def place() -> Place:
    """This process's, from its environment."""
    rank, world, local, host, port = (os.environ[name] for name in NAMES)
    served = os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True"
    listener = listen(host, int(port))[0] if rank == "0" and not served else None
    address = _towards(host, int(port))
    return Place(
        rank=int(rank),
        world=int(world),
        address=address,
        interface=interface_of(address),
        store=(host, int(port)),
        listener=listener,
        served=served,
        device=int(local),
    )


def _towards(host: str, port: int) -> str:
    """This machine's address as seen from there; nothing is sent."""
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as any_socket:
        any_socket.connect((host, port))
        return str(any_socket.getsockname()[0])
