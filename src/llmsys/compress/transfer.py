"""Has an exchange carried by torch.distributed.

One collective after another is started in the same order on all ranks, and none in a callback: on gloo a callback runs
in a thread of its own, at a moment of its own on each rank, so collectives started there meet others' of another
bucket, and replicas silently differ.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.futures import Future

from llmsys.compress.methods.method import AllGather, AllReduce, AllToAll, Exchange, Request, Sent

Group = Any
"""A process group; None for the default one."""
_gather = getattr(dist, "all_gather_single", None) or dist.all_gather_into_tensor
"""torch 2.13 has renamed it."""


class Transfer:
    """An exchange under way. `future` is that of the collective which it waits for; `sent` is there when it is over, of
    one that asks for nothing at once."""

    def __init__(self, exchange: Exchange, group: Group, world: int) -> None:
        """Makes what is to be sent and starts the first collective."""
        self._exchange, self._group, self._world = exchange, group, world
        self.sent: Sent | None = None
        self.future = _done()
        self._start()

    def advance(self) -> bool:
        """To be called when the collective has arrived: whether another one was started. Else it is over."""
        return self.sent is None and self._start()

    def _start(self) -> bool:
        with without_graph():
            try:
                request = next(self._exchange)
            except StopIteration as end:
                self.sent = end.value
                return False
            assert request is not None, "nothing was asked for"
            self.future = start(request, self._group, self._world)
            waiting = next(self._exchange)  # what need not wait for the wire
        assert waiting is None, "one collective at a time"
        return True


def start(request: Request, group: Group, world: int) -> Future[Any]:
    """Starts a collective; on one rank it is over at once."""
    if world == 1:
        if isinstance(request, AllGather | AllToAll):
            request.output.copy_(request.buffer.view_as(request.output))
        return _done(request.buffer.device)
    match request:
        case AllReduce(buffer):
            work = dist.all_reduce(buffer, group=group, async_op=True)
        case AllGather(buffer, output):
            work = _gather(output.view(-1), buffer, group=group, async_op=True)
        case AllToAll(buffer, output):
            work = dist.all_to_all_single(output.view(-1), buffer.view(-1), group=group, async_op=True)
    future: Future[Any] = work.get_future()
    return future


def _done(device: torch.device | None = None) -> Future[Any]:
    """It has the GPU whose tensors a callback of it may return."""
    done: Future[Any] = Future(devices=[device] if device is not None and device.type == "cuda" else [])
    done.set_result(None)
    return done


def finish(transfers: Sequence[Transfer]) -> Iterator[int]:
    """Waits for all, round by round, each round in order; yields the index of each as it is over."""
    pending = dict(enumerate(transfers))
    while pending:
        for index, transfer in list(pending.items()):
            transfer.future.wait()
            if not transfer.advance():
                del pending[index]
                yield index


@contextlib.contextmanager
def without_graph() -> Iterator[None]:
    """Without a graph, and in the precision that is written: a backward pass may run under autocast."""
    with torch.no_grad(), torch.autocast("cpu", enabled=False), torch.autocast("cuda", enabled=False):
        yield


def simulate(exchanges: Sequence[Exchange]) -> list[Sent]:
    """Carries one exchange for each rank, all in this process: for tests and for studies without a cluster."""
    with without_graph():
        while True:
            try:
                requests = [next(exchange) for exchange in exchanges]
            except StopIteration as end:
                rest = exchanges[1:]
                return [end.value, *(_end(exchange) for exchange in rest)]
            for exchange in exchanges:
                assert next(exchange) is None, "one collective at a time"
            _carry([request for request in requests if request is not None])


def _end(exchange: Exchange) -> Sent:
    try:
        next(exchange)
    except StopIteration as end:
        return end.value
    raise AssertionError("ranks ask for different numbers of collectives")


def _carry(requests: Sequence[Request]) -> None:
    """What the ranks' equal requests do."""
    kind = type(requests[0])
    assert all(type(request) is kind for request in requests)
    buffers: list[Tensor] = [request.buffer for request in requests]
    for rank, request in enumerate(requests):
        match request:
            case AllGather(_, output):
                output.copy_(torch.stack(buffers))
            case AllToAll(_, output):
                output.copy_(torch.stack([buffer[rank] for buffer in buffers]))
    if kind is AllReduce:
        total = torch.stack(buffers).sum(0)
        for buffer in buffers:
            buffer.copy_(total)
