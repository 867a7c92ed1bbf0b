"""The cost model's three parameters, measured where an iteration will be: alpha, beta and gamma.

alpha and beta (a message's latency, a byte's time) come from collectives of a few sizes, one kind after another: alpha
from the smallest, beta from what the largest take beyond it, since a shaper lets a few kB through at once; gamma
(a byte of memory's time, in compression) from the methods' own code on two square matrices, on all ranks at once, as in
an iteration. Nothing of a model that is predicted later is measured here: neither its shapes nor its computation.
"""

from __future__ import annotations

import functools
import math
import statistics
import time
from collections.abc import Callable, Sequence

import torch
import torch.distributed as dist
from torch import Tensor

from llmsys.comm import collectives
from llmsys.compress import methods
from llmsys.compress.config import CompressConfig
from llmsys.compress.kernels_cost import Rates, work
from llmsys.compress.measure.clock import Clocked
from llmsys.compress.memory import Memory
from llmsys.compress.methods.method import AllGather, AllReduce, AllToAll, Entry, Exchange, Part, Request
from llmsys.compress.transfer import start, without_graph
from llmsys.cost import links
from llmsys.cost.links import Line

LARGEST_S, LARGEST_BYTES, SMALLEST_BYTES = 0.5, 64 * 2**20, 2**12
"""The largest message takes so long at the nominal rate, or has so many bytes where there is none."""
REPEATS = 5
LARGE = 2
"""So many of the largest messages say beta."""
SIDE = 1536
"""Rows and columns of the matrices on which compression is timed: 9.4 MB each, more than a core's own cache."""


def sizes(mbit: float | None) -> list[int]:
    """Bytes of the messages, each four times the one before."""
    largest = LARGEST_BYTES if mbit is None else min(LARGEST_BYTES, int(mbit * 1e6 / 8 * LARGEST_S))
    count = max(2, int(math.log(largest / SMALLEST_BYTES, 4)) + 1)
    return [largest // 4**i // 64 * 64 for i in reversed(range(count))]


def lines(mbit: float | None, device: torch.device, beat: Callable[[], None]) -> dict[str, Line]:
    """Kind of collective -> its link, by what rank 0 has seen; alike on all ranks."""
    world = collectives.world()
    if world == 1:
        return {}
    requests: dict[str, Callable[[int], Request]] = {
        "all_reduce": lambda n: AllReduce(torch.zeros(n // 4, device=device)),
        "all_gather": lambda n: AllGather(
            torch.zeros(n // 4 // world, device=device), torch.zeros(world, n // 4 // world, device=device)
        ),
        "all_to_all": lambda n: AllToAll(
            torch.zeros(world, n // 4 // world, device=device), torch.zeros(world, n // 4 // world, device=device)
        ),
    }
    found = {}
    for kind, request in requests.items():
        numbers, seconds = sizes(mbit), []
        for n in numbers:
            seconds.append(_median(functools.partial(_carry, request(n), world), device))
            beat()
        both = torch.tensor(_line(kind, numbers, seconds, world), dtype=torch.float64, device=device)
        collectives.broadcast(both)
        found[kind] = Line(*both.tolist())
    return found


def _line(kind: str, numbers: Sequence[int], seconds: Sequence[float], world: int) -> tuple[float, float]:
    """(alpha, beta) of a message, of collectives over growing `numbers` of bytes."""
    latency = seconds[0]
    beyond = [(t - latency) / n for n, t in zip(numbers, seconds, strict=True)]
    beta = max(statistics.median(beyond[-LARGE:]), 0.0)
    return latency / links.steps(kind, world), beta / links.volume(kind, world)


def _carry(request: Request, world: int) -> None:
    start(request, None, world).wait()


def rates(config: CompressConfig, device: torch.device) -> Rates:
    """How fast this machine compresses by `config`'s method: memory's bandwidth is what makes `kernels_cost.work` as
    long as the method took here, all else as it is: products as fast as memory allows, and the least that a kernel
    takes as an addition of one element does. The slowest rank's; alike on all ranks."""
    one = torch.zeros(1, device=device)
    launch = _median(lambda: _many(lambda: one.add_(1.0)), device) / 100
    world, shapes = collectives.world(), [("a", (SIDE, SIDE)), ("b", (SIDE, SIDE))]
    grads = [torch.randn(shape, device=device) for _, shape in shapes]
    took = _compression(config, [name for name, _ in shapes], grads, world, device)
    named = [(name, shape, 4) for name, shape in shapes]

    def predicted(bytes_per_s: float) -> float:
        made = Rates(flops_per_s=math.inf, bytes_per_s=bytes_per_s, launch_s=launch)
        costs = [work(named, config, made, world, step) for step in range(2)]
        return sum(sum(cost.before) + cost.during + cost.after for cost in costs) / len(costs)

    found = torch.tensor([_solve(predicted, took), launch], dtype=torch.float64, device=device)
    everywhere = collectives.all_gather(found)
    return Rates(
        flops_per_s=math.inf,
        bytes_per_s=float(everywhere[:, 0].min()),
        launch_s=float(everywhere[:, 1].max()),
    )


def _compression(
    config: CompressConfig, names: Sequence[str], grads: Sequence[Tensor], world: int, device: torch.device
) -> float:
    """Median seconds that compressing and decompressing take a step."""
    method = Clocked(methods.method(config), device)
    memories = [Memory(name) for name in names]
    flat = torch.cat([grad.reshape(-1) for grad in grads])
    views = [v.view(g.shape) for v, g in zip(flat.split([g.numel() for g in grads]), grads, strict=True)]
    times = []
    for step in range(2 * REPEATS):
        method.reset()
        entries = [Entry(name, view, memory) for name, view, memory in zip(names, views, memories, strict=True)]
        if world > 1:
            dist.barrier()
        _alone(method.exchange(Part(entries, flat, 0, world, step)), world)
        times.append(method.compress_s + method.decompress_s)
    return statistics.median(times[2:])


def _alone(exchange: Exchange, world: int) -> None:
    """As if all ranks had sent what this one sends; nothing is on the wire."""
    with without_graph():
        for request in exchange:
            match request:
                case AllReduce(buffer):
                    buffer.mul_(world)
                case AllGather(buffer, output) | AllToAll(buffer, output):
                    output.copy_(buffer.expand_as(output))


def _median(act: Callable[[], object], device: torch.device) -> float:
    times = []
    for _ in range(REPEATS + 1):
        if dist.is_initialized() and dist.get_world_size() > 1:
            dist.barrier()
        before = time.perf_counter()
        act()
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        times.append(time.perf_counter() - before)
    return statistics.median(times[1:])


def _many(act: Callable[[], object]) -> None:
    for _ in range(100):
        act()


def _solve(predicted: Callable[[float], float], wanted: float) -> float:
    """The bandwidth at which `predicted`, which falls with it, is `wanted`; the highest, where least times of kernels
    alone take longer."""
    low, high = 1.0, 1e14
    for _ in range(100):
        middle = math.sqrt(low * high)
        low, high = (middle, high) if predicted(middle) > wanted else (low, middle)
    return high
