"""Which codec each stage of a pipeline uses for what it sends: agreed with each plan, so that everybody knows.

    none        as it is
    fp16, bf16  two bytes an element
    int8        one, and a scale in fp32 for each `GROUP` of them
    adaptive    each line its own: what takes no longer than the pass that computes it goes as it is, since it is sent
                while the next one is computed; of what does, the first of `LADDER` that takes no longer, or the last

So lines are compressed the more the slower they are (FusionLLM, arXiv 2410.12707). What an element loses is not sent
later, as it is of gradients in data parallelism: it belongs to its sample, and the next one is another. And what has
been lost so far would be one more state that has to be copied, and computed again when its stage is lost; without it
what goes out follows from tensors alone.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Self

if TYPE_CHECKING:
    from llmsys.decentral.cost import Costs

NONE, ADAPTIVE = "none", "adaptive"
GROUP = 64
"""Elements with one scale."""
SHARES = {NONE: 1.0, "fp16": 0.5, "bf16": 0.5, "int8": (1 + 4 / GROUP) / 4}
"""Bytes that are sent of one of fp32. What is smaller than a group has a scale, too."""
LADDER = (NONE, "bf16", "int8")
"""Of `adaptive`: bf16, as gradients are often smaller than what fp16 has."""


def strongest(compress: str) -> float:
    """The least share of a workload's choice."""
    return SHARES[LADDER[-1] if compress == ADAPTIVE else compress]


def codec(costs: Costs, order: Sequence[int], cuts: Sequence[int], at: int, *, back: bool = False) -> str:
    """Of what the stage `at` of a pipeline sends to the next one, or back to the one before."""
    work, own, begin, end = costs.work, costs.chain, cuts[at], cuts[at + 1]
    if work.compress != ADAPTIVE:
        return work.compress
    seconds, forward = costs.compute_s(order[at], begin, end), 1 / work.passes
    if back:
        nbytes = float(own.back[begin]) if work.train else 0.0
        return weakest(nbytes, nbytes, seconds * (1 - forward), costs.beta(order[at], order[at - 1]))
    nbytes, hidden = float(own.ahead[end]), float(own.hidden[end])
    return weakest(nbytes, hidden, seconds * forward, costs.beta(order[at], order[at + 1]))


def over(costs: Costs, order: Sequence[int], cuts: Sequence[int], at: int) -> tuple[float, float]:
    """Bytes of a micro-batch that the stage `at` sends to the next one, and that one back."""
    cut, own = cuts[at + 1], costs.chain
    if costs.work.compress != ADAPTIVE or not 0 <= at < len(order) - 1:
        return costs.ahead[cut], costs.back[cut]
    ahead, back = SHARES[codec(costs, order, cuts, at)], SHARES[codec(costs, order, cuts, at + 1, back=True)]
    sent = own.ahead[cut] - (1 - ahead) * own.hidden[cut]
    return sent, own.back[cut] * (back if costs.work.train else 0.0)


def weakest(plain: float, hidden: float, seconds: float, beta: float) -> str:
    """Of `LADDER`, for a message of `plain` bytes of which `hidden` may be compressed, so that at `beta` seconds a byte
    it takes no longer than `seconds`."""
    return next((c for c in LADDER if (plain - (1 - SHARES[c]) * hidden) * beta <= seconds), LADDER[-1])


@dataclass(frozen=True, kw_only=True)
class Codecs:
    """Of what each stage sends `ahead`, and `back`."""

    ahead: tuple[str, ...]
    back: tuple[str, ...]

    @classmethod
    def of(cls, costs: Costs, order: Sequence[int], cuts: Sequence[int]) -> Self:
        """Of a pipeline, as its costs say."""
        ends = range(len(order) - 1)
        ahead = tuple(codec(costs, order, cuts, at) for at in ends)
        back = tuple(codec(costs, order, cuts, at + 1, back=True) for at in ends)
        return cls(ahead=(*ahead, NONE), back=(NONE, *back))

    @classmethod
    def of_json(cls, data: Mapping[str, Any]) -> Self:
        """ValueError for codecs that there are none of."""
        found = cls(ahead=tuple(data["ahead"]), back=tuple(data["back"]))
        if unknown := {*found.ahead, *found.back} - set(SHARES):
            raise ValueError(f"codec {min(map(str, unknown))}: must be one of {', '.join(SHARES)}")
        return found
