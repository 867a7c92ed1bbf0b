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
        ahead = tuple(costs.codec(order, cuts, at) for at in ends)
        back = tuple(costs.codec(order, cuts, at + 1, back=True) for at in ends)
        return cls(ahead=(*ahead, NONE), back=(NONE, *back))

    @classmethod
    def of_json(cls, data: Mapping[str, Any]) -> Self:
        """ValueError for codecs that there are none of."""
        found = cls(ahead=tuple(data["ahead"]), back=tuple(data["back"]))
        if unknown := {*found.ahead, *found.back} - set(SHARES):
            raise ValueError(f"codec {min(map(str, unknown))}: must be one of {', '.join(SHARES)}")
        return found
