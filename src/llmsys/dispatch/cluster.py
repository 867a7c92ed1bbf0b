"""Before the first run is sent to a cluster: that it answers, that it has what the runs need, that its nodes have this
code and the folder of results, and what machine they are. Everything that is wrong is said here, in one line."""

from __future__ import annotations

import contextlib
import dataclasses
import os
import platform
import secrets
import socket
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from llmsys import device, schema, tasks
from llmsys.dispatch import needs
from llmsys.dispatch.needs import Need, Node
from llmsys.errors import MissingPackage
from llmsys.job import code_hash

ANSWER_S = 5.0
"""How long an address may take to accept a connection."""
ON_LOOPBACK = {"RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER": "0", "RAY_USAGE_STATS_ENABLED": "0"}
"""Of a cluster of this machine alone: Ray then takes loopback for its address, on every system; and it tells nobody."""
ALONE = {**ON_LOOPBACK, "RAY_AUTH_MODE": "disabled"}
"""Of one that nobody else is to know of, and that leaves no token in the home folder: tests' and benchmarks'."""
ALWAYS = {"RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO": "0"}
"""What Ray will do by itself in later versions: it hides no GPU from a worker that has asked for none."""


@contextlib.contextmanager
def ready(configs: Sequence[Mapping[str, Any]]) -> Iterator[None]:
    """A cluster for those of these composed configs that have `dispatch=ray`, as long as the block lasts; nothing at
    all where there are none. ValueError for whatever is wrong, MissingPackage where Ray is not installed."""
    own = [each for each in configs if _wanted(each)]
    if not own:
        yield
        return
    for each in own:
        schema.build(dict(each))
    addresses = {each["dispatch"]["address"] for each in own}
    if len(addresses) > 1:
        raise ValueError(f"dispatch.address: one sweep has one cluster; there are {', '.join(map(str, addresses))}")
    (address,) = addresses
    os.environ.update({key: value for key, value in ALWAYS.items() if key not in os.environ})
    if address is None and not os.environ.get("RAY_ADDRESS"):
        os.environ.update(ON_LOOPBACK)
    reach(address or os.environ.get("RAY_ADDRESS") or "", "dispatch.address" if address else "RAY_ADDRESS")
    try:
        from llmsys.dispatch import ray
    except ModuleNotFoundError as error:
        raise MissingPackage(f"dispatch=ray: needs {error.name}: pip install 'llmsys[ray]'") from None
    ray.connect(address, device.threads())
    try:
        there = ray.nodes()
        for need in {str(need): need for need in map(Need.of, own)}.values():
            needs.check(need, there)
        device.runs_are_on(_machine(ray, own, there))
        yield
    finally:
        device.runs_are_on(None)
        ray.disconnect()


def _wanted(config: Mapping[str, Any]) -> bool:
    given = config.get("dispatch")
    return isinstance(given, dict) and given.get("kind") == "ray" and config["task"].get("kind") not in tasks.LIGHT


def reach(address: str, key: str) -> None:
    """ValueError, which names `key`, where nobody listens at `ray://host:port` or `host:port`."""
    host, _, port = address.removeprefix("ray://").rpartition(":")
    if address in ("", "auto", "local"):
        return
    if not host or not port.isdigit():
        raise ValueError(f"{key}={address}: must be auto, host:port or ray://host:port")
    try:
        socket.create_connection((host, int(port)), timeout=ANSWER_S).close()
    except OSError as error:
        raise ValueError(f"{key}={address}: does not answer: {error.strerror or error}") from None


def _machine(ray: Any, configs: Sequence[Mapping[str, Any]], there: Sequence[Node]) -> device.Machine:
    """What the nodes that runs can be on agree to be. Of several on one machine one is asked."""
    found: dict[str, Node] = {}
    for config in configs:
        for node in needs.eligible(_with_gpus(config, there), there):
            found.setdefault(node.address, node)
    results = {str(each["results"]) for each in configs}
    said = [answer for root in sorted(results) for answer in _asked(ray, root, list(found.values()))]
    return agreed([(node, _given(device.Machine(**answer["machine"]), node)) for node, answer in said])


def _given(machine: device.Machine, node: Node) -> device.Machine:
    """With no more threads than Ray gives away there: in a container, say, a process may see more."""
    return dataclasses.replace(machine, threads=max(1, min(machine.threads, int(node.resources.get("CPU", 1)))))


def _with_gpus(config: Mapping[str, Any], there: Sequence[Node]) -> Need:
    """What is needed if `auto` is to mean a GPU, where there are some; else as it is said."""
    auto = config["hardware"]["device"] == "auto" and config["dispatch"]["gpus"] is None
    on_gpus = Need.of({**config, "hardware": {**config["hardware"], "device": "cuda"}})
    return on_gpus if auto and on_gpus.runs(there) else Need.of(config)


def _asked(ray: Any, root: str, which: Sequence[Node]) -> list[tuple[Node, dict[str, Any]]]:
    """Each node's answer. ValueError for one that cannot leave results in `root`, or that has other code."""
    folder = Path(root).expanduser().resolve()
    asked = folder / f".asked-{secrets.token_hex(8)}"
    try:
        folder.mkdir(parents=True, exist_ok=True)
        asked.write_text(platform.node(), encoding="utf-8")
    except OSError as error:
        raise ValueError(f"results={root}: cannot be written: {error.strerror} ({folder})") from None
    try:
        said = list(ray.survey(asked, which))
    finally:
        asked.unlink(missing_ok=True)
    for node, answer in said:
        if answer["fault"]:
            raise ValueError(
                f"results={root}: {folder} {answer['fault']}: node {node}; it must be one folder that all nodes share, "
                "e.g. LLMSYS_RESULTS=/shared/results"
            )
        if answer["code"] != code_hash():
            raise ValueError(f"dispatch=ray: node {node}: has other code of llmsys than this; install the same there")
    return said


def agreed(machines: Sequence[tuple[Node, device.Machine]]) -> device.Machine:
    """The machine that all of these are, with the fewest threads of any. ValueError where their devices differ: a run's
    id names the device, and where it will be made is not known before."""
    first, own = machines[0]
    for node, other in machines:
        if (other.gpu or other.cpu) != (own.gpu or own.cpu):
            raise ValueError(
                f"dispatch=ray: nodes have different devices: {first.name} {own.gpu or own.cpu}, {node.name} "
                f"{other.gpu or other.cpu}; say which by a resource that only they have: "
                "+dispatch.resources.NAME=0.01"
            )
    return device.Machine(own.cpu, own.gpu, min(m.gpus for _, m in machines), min(m.threads for _, m in machines))
