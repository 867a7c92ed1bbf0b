"""What a job trains, by which rules, and what came of each step."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from llmsys.decentral.chain import Chain
from llmsys.decentral.exports import Exports
from llmsys.decentral.graph import Graph
from llmsys.decentral.noise import Noise
from llmsys.decentral.planes import Arrays, Rules
from llmsys.decentral.wire import FRAME_BYTES, HEADER_BYTES
from llmsys.errors import NotANumber

TENSOR_BYTES = FRAME_BYTES - HEADER_BYTES


@dataclass(frozen=True, kw_only=True, eq=False)
class Training:
    """What is trained: `graph` with `tensors` (by key) as they are in the beginning; `data` of a step, one mapping for
    each micro-batch; `steps` of it, each with its `rate`; gradients clipped to a norm of `clip` (0: not at all). Of
    each stage's state `copies` are kept by other providers and, with `owner_keeps`, one by the broker, of every
    `copy_every`-th step (0: as the lines allow, see `copies.copies_every`). `exports`: what planes are sent that run
    programs of their own; None: providers with such planes are sent away. `vocabulary`, `rows` of each
    stream: of what is generated (`rules.streams`). `noise` on what private stages send to others. A share of `checks`
    of what stages compute is computed again (`checking`); where that shows that the model is not what it should be,
    the job ends, if `on_cheat` is `stop`. Who is at one task for more than `hung_s` seconds hangs."""

    graph: Graph
    chain: Chain
    tensors: Arrays
    rules: Rules
    data: Callable[[int], Sequence[Arrays]]
    steps: int
    rate: Callable[[int], float]
    clip: float = 0.0
    exports: Exports | None = None
    copies: int = 1
    owner_keeps: bool = True
    copy_every: int = 1
    checks: float = 0.0
    on_cheat: str = "stop"
    hung_s: float = 600.0
    vocabulary: int = 0
    rows: int = 0
    noise: Noise | None = None

    def __post_init__(self) -> None:
        """ValueError for a tensor that no frame carries."""
        for key, tensor in self.tensors.items():
            if len(tensor.data) > TENSOR_BYTES:
                size = f"{len(tensor.data) / 2**20:.0f} MiB"
                raise ValueError(f"model: {key} has {size}: a tensor of at most {TENSOR_BYTES >> 20} MiB is carried")

    def checked(self, results: Sequence[Any]) -> tuple[Any, ...]:
        """What a provider says came of a step. ValueError for what cannot be."""
        if len(results) != self.rules.micro_batches:
            raise ValueError(f"results of {len(results)} micro-batches: there are {self.rules.micro_batches}")
        if not self.rules.streams:
            return tuple(math.nan if each is None else float(each) for each in results)
        for tokens in results:
            if len(tokens) != self.rows or not all(
                type(each) is int and 0 <= each < self.vocabulary for each in tokens
            ):
                raise ValueError("results: tokens that are none of the model's")
        return tuple(tuple(each) for each in results)

    def update(self, step: int, squares: Mapping[str, float], results: tuple[Any, ...]) -> Update:
        """What all apply after `step`, by the norm of all gradients, of which there are `squares` by parameter;
        `results` as `checked`. NotANumber where a loss or a gradient is none."""
        norm = math.sqrt(sum(squares[key] for key in sorted(squares)))
        losses = () if self.rules.streams else results
        if not all(map(math.isfinite, (norm, *losses))):
            raise NotANumber(f"step {step}: a loss or a gradient is NaN or infinite")
        scale = self.clip / norm if self.clip and norm > self.clip else 1.0
        made = {"tokens" if self.rules.streams else "losses": results}
        return Update(rate=self.rate(step), scale=scale, **made)


@dataclass(kw_only=True)
class Update:
    """A committed step: what each stage applied, and the losses of its micro-batches, or the tokens of each stream."""

    rate: float
    scale: float
    losses: tuple[float, ...] = ()
    tokens: tuple[tuple[int, ...], ...] = ()

    @property
    def loss(self) -> float:
        return sum(self.losses) / len(self.losses)
