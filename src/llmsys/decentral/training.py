"""What a job trains, by which rules, and what came of each step."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from llmsys.decentral.chain import Chain
from llmsys.decentral.exports import Exports
from llmsys.decentral.graph import Graph
from llmsys.decentral.planes import Arrays, Rules


@dataclass(frozen=True, kw_only=True, eq=False)
class Training:
    """What is trained: `graph` with `tensors` (by key) as they are in the beginning; `data` of a step, one mapping for
    each micro-batch; `steps` of it, each with its `rate`; gradients clipped to a norm of `clip` (0: not at all). Of
    each stage's state `copies` are kept by others, of every `copy_every`-th step (0: as the lines allow, see
    `recovery.copies_every`). `exports`: what planes are sent that run programs of their own; None: providers with such
    planes are sent away."""

    graph: Graph
    chain: Chain
    tensors: Arrays
    rules: Rules
    data: Callable[[int], Sequence[Arrays]]
    steps: int
    rate: Callable[[int], float]
    clip: float = 0.0
    exports: Exports | None = None
    copies: int = 2
    copy_every: int = 1


@dataclass(kw_only=True)
class Update:
    """A committed step: what each stage applied, and the losses of its micro-batches."""

    rate: float
    scale: float
    losses: tuple[float, ...]

    @property
    def loss(self) -> float:
        return sum(self.losses) / len(self.losses)
