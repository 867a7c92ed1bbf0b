"""The FLOPs of an optimizer step by module, named as in the built model: `flops.step_flops`, told apart.

`model.layers.0.self_attn.q_proj` has its product and that of an adapter beside it. What is no module's has the name of
its block and behind `@` what it is: `@scores` and `@context` of eager attention, `@attention` of a kernel. A product
that no module can be named for (blocks that run as chains of functions, a classifier) has the name of its part.
"""

from __future__ import annotations

from typing import NamedTuple, Unpack

from llmsys import schema
from llmsys.cost import walk
from llmsys.cost.case import Case, Facts


class Flops(NamedTuple):
    """Of one module: `recompute` is what the backward pass computes again."""

    forward: float = 0.0
    backward: float = 0.0
    recompute: float = 0.0

    def plus(self, other: Flops) -> Flops:
        return Flops(*(a + b for a, b in zip(self, other, strict=True)))


def by_module(
    model: schema.Model, train: schema.Train, method: schema.Method, engine: schema.Engine, **facts: Unpack[Facts]
) -> dict[str, Flops]:
    """Name -> FLOPs of one optimizer step on one rank; all together are `step_flops`. Empty for methods that train no
    weight of the model. `facts`: see `Case`. ValueError for an engine or a method that is not known here."""
    case = Case(model, train, method, engine, **facts)
    if not case.trains:
        return {}
    tape, times = walk.run(case), schema.accumulation(train, engine)
    whole = {block for block, policy in zip(tape.blocks, case.policies, strict=False) if policy == "block"}
    found: dict[str, Flops] = {}
    for part, products in tape.products.items():
        for i, each in enumerate(products):
            again = each.forward if part in whole and i < tape.last_save[part] else 0.0
            mine = Flops(times * each.forward, times * each.backward, times * (each.again + again))
            found[each.module] = found.get(each.module, Flops()).plus(mine)
    return {name: flops for name, flops in found.items() if any(flops)}
