"""How much arithmetic an optimizer step is: matrix products only, 2 FLOPs for a multiply-add.

Forward: 2 N T for N weights in products over T tokens, and 4 B L L D a layer for attention (scores and mix; the whole
square, as kernels are usually counted, though a causal one may skip half). Backward: each product once more for each
operand that needs a gradient, so 2x the forward for full training, 1x where the weight is frozen, and for adapters
dA, dB and both inputs' (LoRA) or all but dA (LoRA-FA). A fused attention kernel computes its scores again: 2.5x.
`train.recompute=block` adds a second forward of each block, up to the last tensor that the backward pass reads
(torch's checkpoint stops there, so llama's `down_proj` is not run again). See `tape` for the rule, `walk` for the pass.
"""

from __future__ import annotations

from llmsys import schema
from llmsys.cost import memory, shapes, walk


def step_flops(
    model: schema.Model,
    train: schema.Train,
    method: schema.Method,
    *,
    num_labels: int = 2,
    padded: bool | None = None,
    device: str = "cpu",
) -> float:
    """FLOPs of one optimizer step on one rank: `train.accumulation` micro-batches, forward and backward.

    The optimizer's own arithmetic, elementwise and far smaller, is left out. 0 for methods that train no weight of the
    model; ValueError for a method that is not known here.
    """
    if method.kind in shapes.UNTRAINED:
        return 0.0
    if method.kind not in shapes.METHODS:
        raise ValueError(f"method.kind={method.kind}: no FLOP count for it; there is one for {shapes.METHODS}")
    tape, _ = walk.run(model, memory.setting(model, train, method, num_labels=num_labels, padded=padded, device=device))
    total = sum(tape.forward.values()) + sum(tape.backward.values())
    if train.recompute == "block":
        total += sum(flops for part, flops in tape.until_last_save.items() if part.startswith("block"))
    return total * train.accumulation
