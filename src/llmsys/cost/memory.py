"""How many bytes a training step holds, before anything is loaded: weights, gradients, optimizer, activations, logits.

    weights      every parameter in the model's dtype, an adapter's A and B in theirs, and buffers
    gradients    what is trained, in its own dtype
    optimizer    AdamW: two moments like the gradient, and a 4-byte step count for each tensor
    master       fp32 copies of the weights, where the engine keeps them
    activations  what autograd keeps of the blocks and the ends of the model; derived in `tape` and `families`
    logits       the loss's log-probabilities: 4 bytes x tokens x vocabulary, often the largest single tensor; with
                 `train.loss=chunked` the gradients, already made, of the head's input and of its weight if trained

What of the first four a rank has is the engine's matter: `engines`. `lora_peft` trains A and B; `lorafa_peft` trains B,
with A frozen, so no adapted layer keeps its input (arXiv 2308.03303, section 3.2). Both train a text classifier's head
too, which is new. `majority` trains nothing and `probe` nothing that passes through the model.

The sum is `accounted_bytes` of a record: what is there from a forward pass to its backward pass. Under
`train.recompute=block` a block keeps only its inputs.

Not included: the allocator's slack, workspaces, and what is needed for a moment. `peak_bytes` adds the largest of
those: the gradient of the logits, what recomputation brings back of a block, weights that an engine gathers.
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

    `kept` from forward to backward without the logits, which saved-tensor hooks see; `returns`: what recomputation
    brings back for the largest block; `fleeting`: what a chunked loss needs for a moment, beside the gradients that it
    keeps in place of logits; `blocks`: each block's own share, as it is without recomputation.
    """

    kept: int = 0
    returns: int = 0
    logits: int = 0
    fleeting: int = 0
    blocks: tuple[int, ...] = (0,)


def estimate(
    model: schema.Model, train: schema.Train, method: schema.Method, engine: schema.Engine, **facts: Unpack[Facts]
) -> dict[str, int]:
    """Bytes a rank by kind: weights, gradients, optimizer, master where there is one, activations, logits.

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
        "activations": parts.kept,
        "logits": parts.logits,
    }


def peak_bytes(
    model: schema.Model, train: schema.Train, method: schema.Method, engine: schema.Engine, **facts: Unpack[Facts]
) -> int:
    """The most bytes alive at once on the device in a step: what a check before loading should compare with it.

    Two moments compete. At the start of the backward pass all saved tensors are there, with the logits (held by the
    model's output) and, in fp32, their gradient before and after the log-softmax. At its end the saved tensors are
    gone and all gradients are there. Gradients are there at both where micro-batches are accumulated. What an engine
    offloads to the host counts where the device is the host. A chunked loss has no logits, but a moment of its own.
    """
    case = Case(model, train, method, engine, **facts)
    parts, held = ledger(case), engines.hold(case)
    host = {} if case.device == "cpu" else held.host
    gradients = held.gradients - host.get("gradients", 0)
    always = held.weights + held.optimizer + held.master - sum(host.values()) + host.get("gradients", 0)
    # per logit: itself in the products' width, and two fp32 gradients; log-probabilities (4) are in `logits`
    per_logit = 8 + (2 if train.precision == "bf16" else 4)
    start = parts.kept + parts.logits
    start += max(parts.returns, parts.fleeting) if parts.fleeting else parts.returns + parts.logits * per_logit // 4
    if schema.accumulation(train, engine) > 1:
        start += gradients
    return always + held.fleeting + max(start, gradients)


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
    for part, storages in tape.saved.items():
        kept |= tape.inputs[part] if policies.get(part) == "block" else storages.keys()
    returns = 0
    for block, policy in policies.items():
        again = tape.bytes_of(tape.saved[block].keys() - kept) if policy == "block" else tape.returns[block]
        returns = max(returns, again)
    return Ledger(
        kept=tape.bytes_of(kept),
        returns=returns,
        logits=tape.bytes_of(set(logits)),
        fleeting=tape.fleeting,
        blocks=tuple(blocks),
    )


def bytes_per_block(model: schema.Transformer, train: schema.Train, method: schema.Method) -> float:
    """Saved bytes of an inner block over B L D: the unit in which papers and `lorafa` compare methods."""
    deep = dataclasses.replace(model, num_layers=2)
    blocks = ledger(Case(deep, train, method, schema.Engine())).blocks
    return blocks[1] / (train.micro_batch * train.length * model.hidden_size)
