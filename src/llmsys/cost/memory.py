"""How many bytes a training step holds, before anything is loaded: weights, gradients, optimizer, activations, logits.

    weights      every parameter in the model's dtype, an adapter's A and B in theirs, and buffers
    gradients    what is trained, in its own dtype
    optimizer    AdamW: two moments like the gradient, and a 4-byte step count for each tensor
    master       fp32 copies of the weights, where the engine keeps them
    compress     what gradient compression keeps of earlier gradients: `compressed`
    activations  what autograd keeps of the blocks and the ends of the model; derived in `tape` and `families`
    logits       the loss's log-probabilities: 4 bytes x tokens x vocabulary, often the largest single tensor; with
                 `train.loss=chunked` the gradients, already made, of the head's input and of its weight if trained

What of the first four a rank has is the engine's matter: `engines`. `lora_peft` trains A and B; `lorafa_peft` trains B,
with A frozen, so no adapted layer keeps its input (arXiv 2308.03303, section 3.2). `lora` and `lorafa` run the blocks
of LLaMA, BERT, RoBERTa and T5 as chains of pieces, and GPT-2's adapted layers as pieces one by one (`pieces`,
`chains`). All train a text classifier's head too, which is new. `majority` trains nothing and `probe` nothing that
passes through the model.

The sum is `accounted_bytes` of a record: what is there from a forward pass to its backward pass. Under
`train.recompute=block` a block keeps only its inputs.

Not included: the allocator's slack, workspaces, and what is needed for a moment. `peak_bytes` adds the largest of
those: the gradient of the logits, what recomputation brings back of a block, what an engine gathers or exchanges.
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import Unpack

from llmsys import schema
from llmsys.cost import engines, walk
from llmsys.cost.case import Case, Facts


@dataclass(frozen=True, kw_only=True)
class Ledger:
    """What autograd keeps of one micro-batch, in bytes.

    `kept` from forward to backward without the logits, which saved-tensor hooks see; `returns`: the most that the
    backward pass of a block makes beside that, what it computes again and gradients on their way; `moments`: what is
    alive of both in the backward pass of each part, when later parts are done and gone; `fleeting`: what a chunked loss
    needs for a moment, beside the gradients that it keeps in place of logits; `blocks`: each block's own share, as it
    is without recomputation.
    """

    kept: int = 0
    returns: int = 0
    logits: int = 0
    fleeting: int = 0
    moments: tuple[int, ...] = ()
    blocks: tuple[int, ...] = (0,)


def estimate(
    model: schema.Model, train: schema.Train, method: schema.Method, engine: schema.Engine, **facts: Unpack[Facts]
) -> dict[str, int]:
    """Bytes a rank by kind: weights, gradients, optimizer, master and compress where there are, activations, logits.

    Host memory that an engine offloads to is included. `facts`: see `Case`. Raises ValueError for an engine or a method
    that is not known here, and for a target that names no layer.
    """
    case = Case(model, train, method, engine, **facts)
    parts, held = ledger(case), engines.hold(case)
    return {
        "weights": held.weights,
        "gradients": held.gradients,
        "optimizer": held.optimizer,
        **({"master": held.master} if held.master else {}),
        **({"compress": held.compress} if held.compress else {}),
        "activations": parts.kept,
        "logits": parts.logits,
    }


def peak_bytes(
    model: schema.Model, train: schema.Train, method: schema.Method, engine: schema.Engine, **facts: Unpack[Facts]
) -> int:
    """The most bytes alive at once on the device in a step: what a check before loading should compare with it.

    Many moments compete. At the start of the backward pass all saved tensors are there, and in fp32 the gradient of the
    logits before and after the log-softmax. (A chunked loss has no logits, but a moment of its own.) Then the backward
    pass of each block, from the last to the first: what later ones kept is gone, and their gradients have come. At its
    end all gradients are there. Where micro-batches are accumulated they always are. What an engine offloads to the
    host counts where the device is the host.
    """
    case = Case(model, train, method, engine, **facts)
    parts, held = ledger(case), engines.hold(case)
    host = {} if case.device == "cpu" else held.host
    gradients = held.gradients - host.get("gradients", 0)
    always = held.weights + held.optimizer + held.master + held.compress - sum(host.values()) + host.get("gradients", 0)
    before = gradients if schema.accumulation(train, engine) > 1 else 0
    loss = parts.kept + parts.logits + (parts.fleeting or 2 * parts.logits) + before
    last = len(parts.moments) - 1
    blocks = (moment + max(before, gradients * (last - i) // (last + 1)) for i, moment in enumerate(parts.moments))
    return always + held.fleeting + max(loss, gradients, *blocks)


def ledger(case: Case) -> Ledger:
    """The saved tensors of one micro-batch."""
    if not case.trains:
        return Ledger()
    tape = walk.run(case)
    logits = tape.saved.pop("logits")
    blocks, seen = [], set[int]()
    for part, storages in tape.saved.items():
        if part in tape.blocks:
            blocks.append(tape.bytes_of(storages.keys() - seen))
        seen |= storages.keys()
    policies = dict(zip(tape.blocks, case.policies, strict=False))
    kept: set[int] = set()
    returns, moments = 0, []
    for part, storages in tape.saved.items():
        own = tape.inputs[part] if policies.get(part) == "block" else storages.keys()
        # `passing` counts what the part saves itself; what is kept anyway must not count twice
        moments.append(tape.bytes_of(kept | own) + tape.passing[part] - tape.bytes_of((own - kept) & storages.keys()))
        kept |= own
        returns = max(returns, moments[-1] - tape.bytes_of(kept))
    return Ledger(
        kept=tape.bytes_of(kept),
        returns=returns,
        logits=tape.bytes_of(set(logits)),
        fleeting=tape.fleeting,
        moments=tuple(moments),
        blocks=tuple(blocks),
    )


def bytes_per_block(model: schema.Transformer, train: schema.Train, method: schema.Method) -> float:
    """Saved bytes of an inner block over B L D: the unit in which papers and `lorafa` compare methods."""
    deep = dataclasses.replace(model, num_layers=2)
    blocks = ledger(Case(deep, train, method, schema.Engine())).blocks
    return blocks[1] / (train.micro_batch * train.length * model.hidden_size)
