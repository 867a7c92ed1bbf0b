"""The process group of a run: gloo between CPUs, NCCL between GPUs."""

from __future__ import annotations

import contextlib
import datetime
import os
from collections.abc import Iterator

import torch
import torch.distributed as dist

from llmsys.comm.place import LOOPBACK_INTERFACE, Place

TIMEOUT = datetime.timedelta(minutes=30)
"""How long a rank waits in a collective for the others. One that dies is noticed at once, by its closed connection."""
INTERFACES = ("GLOO_SOCKET_IFNAME", "NCCL_SOCKET_IFNAME")
VARIABLES = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT", *INTERFACES)
"""Of the environment, by which libraries know that there are ranks."""


@contextlib.contextmanager
def group(place: Place, device: torch.device) -> Iterator[None]:
    """Within the block the ranks can talk; one rank has a group of its own, for engines that need one. A group that is
    open already is used, and left open.

    RANK, WORLD_SIZE and LOCAL_RANK are set, since libraries (DeepSpeed) read them, and afterwards the environment is as
    it was: of a process that goes on (a notebook), other libraries would take these to mean that there are ranks. When
    the block is left by an exception the group is not closed: other ranks may be gone, and closing would wait for them.
    """
    if dist.is_initialized():
        yield
        return
    before = {name: os.environ.get(name) for name in VARIABLES}
    try:
        _open(place, device)
        yield
        dist.destroy_process_group()
    finally:
        for name, value in before.items():
            os.environ.pop(name, None)
            if value is not None:
                os.environ[name] = value


def _open(place: Place, device: torch.device) -> None:
    os.environ.update(RANK=str(place.rank), WORLD_SIZE=str(place.world), LOCAL_RANK=str(place.local_rank))
    for variable in INTERFACES:
        if place.interface == LOOPBACK_INTERFACE:
            os.environ.setdefault(variable, place.interface)
        else:  # a link made for this run
            os.environ[variable] = place.interface
    store = dist.HashStore() if place.world == 1 else _meet(place)
    cuda = device.type == "cuda"
    dist.init_process_group(
        "cpu:gloo,cuda:nccl" if cuda else "gloo",
        store=store,
        rank=place.rank,
        world_size=place.world,
        timeout=TIMEOUT,
        device_id=device if cuda else None,
    )


def _meet(place: Place) -> dist.Store:
    """The store that rank 0 serves at `place.store`."""
    assert place.store is not None, "the ranks of a run need a store"
    host, port = place.store
    os.environ["MASTER_ADDR"], os.environ["MASTER_PORT"] = host, str(port)
    store = dist.TCPStore(
        host,
        port,
        place.world,
        is_master=place.rank == 0 and not place.served,
        timeout=TIMEOUT,
        wait_for_workers=False,
        master_listen_fd=place.listener,
    )
    return dist.PrefixStore("llmsys", store) if place.served else store  # it has keys of its own
