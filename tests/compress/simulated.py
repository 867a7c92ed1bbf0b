"""Ranks without processes: states whose exchanges are carried in one process, and their gradients."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from llmsys.compress.config import CompressConfig
from llmsys.compress.methods.method import (
    WAIT,
    AllGather,
    AllReduce,
    AllToAll,
    Entry,
    Exchange,
    Part,
    Request,
    Sent,
)
from llmsys.compress.state import CompressionState
from llmsys.compress.transfer import simulate, without_graph
from llmsys.profile.live import Live
from llmsys.schema.compress import METHODS

SHAPES = {"a": (12, 10), "b": (7,), "c": (6, 4, 3), "d": (40, 8), "e": (1,)}
"""Matrices, a convolution's kernel, vectors."""
CONFIGS = {
    **{name: CompressConfig(method=name, r=2, density=0.1, min_rate=1) for name in METHODS},
    "ranks": CompressConfig(r=2, min_rate=1, ranks={3: 4, 6: 1}),
    "no reuse": CompressConfig(r=2, min_rate=1, reuse=False),
    "no feedback": CompressConfig(r=2, min_rate=1, error_feedback=False),
    "refreshed acpsgd": CompressConfig(r=3, min_rate=1, refresh_every=4),
    "refreshed powersgd": CompressConfig(method="powersgd", r=3, min_rate=1, refresh_every=4),
    "skipping acpsgd": CompressConfig(r=2, min_rate=1, skip=["c", "d*"]),
    "skipping topk": CompressConfig(method="topk", density=0.1, skip=["c", "e"]),
    "skipping randomk": CompressConfig(method="randomk", density=0.1, skip=["c"]),
    "skipping efsign": CompressConfig(method="efsign", skip=["c", "e"]),
}
"""Every method, and its settings."""
Grads = Mapping[str, Tensor]


class Ranks:
    """`world` ranks of one model. `asked`: what rank 0 asked for in the last step, in order."""

    def __init__(self, config: CompressConfig, world: int, shapes: Mapping[str, Sequence[int]] = SHAPES) -> None:
        named = [(name, torch.empty(*shape)) for name, shape in shapes.items()]
        self.states = [CompressionState(config, named) for _ in range(world)]
        for rank, state in enumerate(self.states):
            state.rank, state.world = rank, world
        self.asked: list[Request] = []

    def step(self, grads: Sequence[Grads], cuts: int = 1) -> list[dict[str, Tensor]]:
        """The aggregate as each rank has it; gradients travel in `cuts` buckets."""
        self.asked = []
        for state in self.states:
            state.begin()
        names = list(grads[0])
        found: list[dict[str, Tensor]] = [{} for _ in grads]
        for cut in range(cuts):
            parts = [self.part(state, rank, names[cut::cuts]) for state, rank in zip(self.states, grads, strict=True)]
            exchanges = [state.method.exchange(part) for state, part in zip(self.states, parts, strict=True)]
            sent = simulate([self._noted(exchanges[0]), *exchanges[1:]])
            for state, part, each, own in zip(self.states, parts, sent, found, strict=True):
                state.note(each)
                own |= {entry.name: entry.grad for entry in part.entries}
        for state in self.states:
            state.advance()
        return found

    def errors(self, name: str) -> list[Tensor]:
        found = [state.memory(name).error for state in self.states]
        assert all(error is not None for error in found)
        return found  # type: ignore[return-value]

    def part(self, state: CompressionState, grads: Grads, names: Sequence[str]) -> Part:
        flat = torch.cat([grads[name].reshape(-1) for name in names])
        views = flat.split([grads[name].numel() for name in names])
        entries = [
            Entry(name, v.view(grads[name].shape), state.memory(name)) for name, v in zip(names, views, strict=True)
        ]
        return Part(entries, flat, state.rank, state.world, state.step)

    def _noted(self, exchange: Exchange) -> Exchange:
        while True:
            try:
                request = next(exchange)
            except StopIteration as end:
                return end.value  # type: ignore[no-any-return]
            if request is not WAIT:
                self.asked.append(request)
            yield request


def random_grads(
    world: int, step: int, shapes: Mapping[str, Sequence[int]] = SHAPES, dtype: torch.dtype = torch.float64
) -> list[dict[str, Tensor]]:
    generator = torch.Generator().manual_seed(step)
    return [
        {
            name: torch.randn(*shape, generator=generator, dtype=torch.float64).to(dtype)
            for name, shape in shapes.items()
        }
        for _ in range(world)
    ]


def distance(found: Sequence[Grads], wanted: Grads) -> float:
    """The largest difference of any element on any rank."""
    return max(float((rank[name] - wanted[name]).abs().max()) for rank in found for name in wanted)


def extra_copies(
    config: CompressConfig, world: int, shapes: Mapping[str, Sequence[int]], dtype: torch.dtype = torch.float32
) -> float:
    """The most bytes that a rank among `world` equal ones has alive beside its gradients, in three steps of one bucket,
    in copies of the gradients."""
    ranks = Ranks(config, 1, shapes)
    (state,) = ranks.states
    state.world = world
    live = Live()
    for step in range(3):
        (grads,) = random_grads(1, step, shapes, dtype)
        part = ranks.part(state, grads, list(grads))
        with live:
            state.begin()
            state.note(_among_equals(state.method.exchange(part), world))
            state.advance()
    return live.peak / part.flat.nbytes


def _among_equals(exchange: Exchange, world: int) -> Sent:
    """Carries an exchange of one rank, whose peers have the same."""
    with without_graph():
        while True:
            try:
                request = next(exchange)
            except StopIteration as end:
                return end.value  # type: ignore[no-any-return]
            match request:
                case AllReduce(buffer):
                    buffer.mul_(world)
                case AllGather(buffer, output):
                    output.copy_(buffer.expand_as(output))
                case AllToAll(buffer, output):
                    output.copy_(buffer)
            del request
            assert next(exchange) is WAIT
