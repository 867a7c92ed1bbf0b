"""`train.recompute=auto`: the least that has to be computed again so that a run fits.

Candidates are one policy for all blocks, and two policies of which the leaner one has the first k blocks: in the
backward pass, which begins at the last block, what a lean block brings back then meets the least that is still kept.
With k the peak falls, so the smallest k that fits is found by halving. Among these the one with the fewest recomputed
FLOPs is taken; it need not be the next policy of the ladder, since `attn+mlp` may free more bytes a FLOP than `mlp`.
"""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Callable
from typing import NamedTuple, Unpack

from llmsys import schema
from llmsys.cost import flops, memory, walk
from llmsys.cost.case import Case, Facts
from llmsys.schema import recompute
from llmsys.schema.coherence import CUT_FAMILIES


class Choice(NamedTuple):
    """A value for `train.recompute`: the peak of a rank in bytes, and FLOPs computed again in a micro-batch."""

    text: str
    peak: int
    again: float


def cheapest(
    fits: Callable[[int], bool],
    model: schema.Transformer,
    train: schema.Train,
    method: schema.Method,
    engine: schema.Engine,
    **facts: Unpack[Facts],
) -> Choice:
    """The cheapest choice whose peak `fits`, and where none does the one with the lowest peak of those for all blocks.

    `train.recompute` is not looked at. `mlp` and `attn+mlp` are for `lora` and `lorafa` of families that can be cut.
    `facts`: see `Case`. ValueError for what `Case` does not know.
    """
    blocks = model.num_layers * (2 if model.family == "t5" else 1)

    def choice(*policies: str) -> Choice:
        text = recompute.text(list(policies))
        chosen = dataclasses.replace(train, recompute=text)
        case = Case(model, chosen, method, engine, **facts)
        peak = memory.peak_bytes(model, chosen, method, engine, **facts)
        return Choice(text, peak, flops.recomputed(case, walk.run(case)))

    cut = isinstance(method, schema.LoRA) and model.family in CUT_FAMILIES
    ladder = recompute.POLICIES if cut else ("none", "block")
    uniform = {policy: choice(*[policy] * blocks) for policy in ladder}
    found = [each for each in uniform.values() if fits(each.peak)]
    for cheap, lean in itertools.combinations(ladder, 2):
        if fits(uniform[cheap].peak) or not fits(uniform[lean].peak):
            continue
        low, high, best = 0, blocks, uniform[lean]  # low blocks do not suffice, high ones do
        while high - low > 1:
            middle = (low + high) // 2
            tried = choice(*[lean] * middle, *[cheap] * (blocks - middle))
            low, high, best = (low, middle, tried) if fits(tried.peak) else (middle, high, best)
        found.append(best)
    return min(found, key=lambda each: each.again) if found else min(uniform.values(), key=lambda each: each.peak)
