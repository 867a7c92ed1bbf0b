"""How much arithmetic an optimizer step is: matrix products and convolutions only, 2 FLOPs for a multiply-add.

Forward: 2 N T for N weights in products over T tokens, and 4 B L L D a layer for attention (scores and mix; the whole
square, as kernels are usually counted, though a causal one may skip half). Backward: each product once more for each
operand that needs a gradient, so 2x the forward for full training, 1x where the weight is frozen, and for adapters
dA, dB and both inputs' (LoRA) or all but dA (LoRA-FA). A fused attention kernel computes its scores again: 2.5x.
`train.recompute=block` adds a second forward of each block, up to the last tensor that the backward pass reads
(torch's checkpoint stops there, so llama's `down_proj` is not run again). See `tape` for the rule, `walk` for the pass.
"""

from __future__ import annotations

import dataclasses
from typing import Unpack

from llmsys import schema
from llmsys.cost import walk
from llmsys.cost.case import Case, Facts
from llmsys.cost.tape import Tape


def step_flops(
    model: schema.Model, train: schema.Train, method: schema.Method, engine: schema.Engine, **facts: Unpack[Facts]
) -> float:
    """FLOPs of one optimizer step on one rank: its share of the micro-batches, forward and backward.

    The optimizer's own arithmetic, elementwise and far smaller, is left out. 0 for methods that train no weight of the
    model. `facts`: see `Case`. ValueError for an engine or a method that is not known here.
    """
    case = Case(model, train, method, engine, **facts)
    if not case.trains:
        return 0.0
    tape = walk.run(case)
    once = sum(tape.forward.values()) + sum(tape.backward.values()) + recomputed(case, tape)
    return once * schema.accumulation(train, engine)


def model_flops(
    model: schema.Model, train: schema.Train, method: schema.Method, engine: schema.Engine, **facts: Unpack[Facts]
) -> float:
    """FLOPs of a step that the model and the method need, whoever computes them: `step_flops` without what is computed
    again, by `train.recompute`, by a fused attention kernel or by the chains of `lora` and `lorafa`. So a forward pass
    counts once and its derivatives by what is trained, and by what lies before that, once each.

    It is what plain autograd does, over eager attention, of peft's adapters.
    """
    train = dataclasses.replace(train, recompute="none", loss="whole")
    if isinstance(model, schema.Transformer):
        model = dataclasses.replace(model, attention="eager")
    if isinstance(method, schema.LoRA):
        own = {field.name: getattr(method, field.name) for field in dataclasses.fields(schema.Adapter)}
        method = schema.Adapter(**{**own, "kind": f"{method.kind}_peft"})
    return step_flops(model, train, method, engine, **facts)


def recomputed(case: Case, tape: Tape) -> float:
    """FLOPs of one micro-batch that the backward pass computes again."""
    whole = (block for block, policy in zip(tape.blocks, case.policies, strict=False) if policy == "block")
    return sum(tape.again.values()) + sum(tape.until_last_save[block] for block in whole)
