"""What a compression method is: a way in which a bucket of gradients becomes their mean over the ranks.

A method talks to nobody. It is a generator that says what it wants exchanged:

    yield AllReduce(buffer)     the exchange is under way from here on: what need not wait for it comes now
    yield WAIT                  now it has arrived
    ...                         decompress

So the same few lines serve as a hook of DDP, where something else happens between the two, on a plain list of
gradients, and for many ranks simulated in one process (`reference`, tests). Between ranks nothing else is said: all
that a method draws at random is a function of names, seed and step.
"""

from __future__ import annotations

from collections.abc import Callable, Generator, Sequence
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from llmsys.compress.config import CompressConfig
from llmsys.compress.memory import Memory


@dataclass(frozen=True)
class AllReduce:
    """`buffer` is to become, in place, the sum of all ranks' buffers."""

    buffer: Tensor


@dataclass(frozen=True)
class AllGather:
    """Row i of `output` [world, N] is to become rank i's `buffer` [N], which stays as it is."""

    buffer: Tensor
    output: Tensor


@dataclass(frozen=True)
class AllToAll:
    """Row i of `buffer` [world, N] goes to rank i; row i of `output` [world, N] is to become what rank i sent here."""

    buffer: Tensor
    output: Tensor


Request = AllReduce | AllGather | AllToAll
WAIT: None = None
"""What a method yields when it needs what it has asked for."""


@dataclass
class Entry:
    """One parameter's gradient, and what is kept of it between steps."""

    name: str
    grad: Tensor
    memory: Memory


def nothing(*_: Tensor | float) -> None:
    pass


@dataclass
class Taken:
    """What an exchange makes of a parameter's memory, of which nobody knows yet whether it will be applied.

    `error`: G was added to this, in place; None if not. `give_back(share)`: puts what was sent there again, times
    `share`, so that error = E + G. `commit`: what has to wait until it is known that the step was applied.
    """

    entry: Entry
    error: Tensor | None = None
    give_back: Callable[[Tensor | float], None] = nothing
    commit: Callable[[], object] = nothing

    def undo(self, share: Tensor, grad: Tensor) -> None:
        """The error is what it was before, but for rounding, if `share` is 1; nothing if it is 0. `grad`: G."""
        self.give_back(share)
        if self.error is not None:
            self.error.addcmul_(grad.view_as(self.error), share.to(self.error.dtype), value=-1)


@dataclass
class Sent:
    """How an exchange ended (bool, 0-dim, alike on all ranks). `arrived`: whether every rank's part was finite; where
    not, memories are already as they were before. `finite`: whether the means that were written are. `taken`: what is
    to be made of each memory when it is known whether the step was applied."""

    arrived: Tensor
    finite: Tensor
    taken: Sequence[Taken] = ()


Exchange = Generator[Request | None, None, Sent]


@dataclass
class Part:
    """Gradients that travel together: a bucket. Each `grad` is a view into `flat` [N]; together they are all of it."""

    entries: list[Entry]
    flat: Tensor
    rank: int
    world: int
    step: int

    def guard(self) -> Tensor:
        """Whether this rank's gradients are all finite (bool, 0-dim); where not they become zero, in place, so that
        nothing that is kept is spoilt. The sum tells: no finite number comes of an infinite or undefined one."""
        finite = torch.isfinite(self.flat.sum(dtype=torch.float32 if self.flat.element_size() < 4 else None))
        where(~finite, self.flat, 0.0)
        return finite

    def undo(self, arrived: Tensor, taken: Sequence[Taken]) -> None:
        """Where something has not `arrived` finite: memories as if the step had never been, in place. Before the means
        are written, as the gradients are there until then. On a GPU nobody waits to know, and nothing is what is
        added."""
        if arrived.is_cuda or not bool(arrived):
            for each in taken:
                each.undo((~arrived).float(), each.entry.grad)

    def sent(self, arrived: Tensor, taken: Sequence[Taken] = ()) -> Sent:
        """How the exchange ended, when the means are written. What has arrived may be finite and yet too large for a
        gradient in half precision; all ranks have written the same."""
        finite = arrived
        if self.flat.element_size() < 4:
            finite = arrived & torch.isfinite(self.flat.sum(dtype=torch.float32))
        return Sent(arrived, finite, taken)

    def split(self, config: CompressConfig) -> tuple[list[Entry], list[Entry]]:
        """(what is compressed, what is excepted and travels whole), by name."""
        whole = [entry for entry in self.entries if config.skips(entry.name)]
        return [entry for entry in self.entries if not config.skips(entry.name)], whole


def where(mask: Tensor, tensor: Tensor, value: float) -> None:
    """Fills `tensor`, in place, with `value` if the single element of `mask` is set. On a GPU nobody waits for it."""
    if mask.is_cuda or bool(mask):
        tensor.masked_fill_(mask, value)


class Method(Protocol):
    """A way to exchange gradients. `linear`: what is sent is, given what the ranks share, a linear function of their
    gradients, so that only the mean of what they keep matters. `rounds`: collectives one after another, at most."""

    linear: bool
    rounds: int

    def exchange(self, part: Part) -> Exchange:
        """Makes each gradient of `part`, in place, its compressed mean over the ranks; not finite, on all of them,
        where that of a rank was not. Changes the memories of the entries."""
        ...
