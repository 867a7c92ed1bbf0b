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

What is needed for a moment beside that is a matter of the step's phases (`phases`): the gradient of the logits, what
recomputation brings back of a block, what an engine gathers or exchanges. `peak_bytes` is the largest of them. Not
included: the allocator's slack.
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import Unpack

from llmsys import schema
from llmsys.cost import engines, phases, walk
from llmsys.cost.case import Case, Facts
from llmsys.cost.phases import Phase
from llmsys.cost.tape import Tape


@dataclass(frozen=True, kw_only=True)
class Ledger:
    """What autograd keeps of one micro-batch, in bytes.

    `kept` from forward to backward without the logits, which saved-tensor hooks see; `returns`: the most that the
    backward pass of a block makes beside that, what it computes again and gradients on their way; `logits`: the loss's
    own, and `head` what the head made of them, before they were cast for the loss. `fleeting`: what a chunked loss
    needs for a moment, beside the gradients that it keeps in place of logits; `blocks`: each block's own share, as it
    is without recomputation.
    `running`: what is alive for a moment in the forward pass of a block that keeps nothing of it.
    `moments` of the backward pass: what is alive of what was kept, comes back and is on its way, when later parts are
    done and gone; and beside it the bytes of those weights whose gradients are there. Only the worst ones.
    """

    kept: int = 0
    returns: int = 0
    logits: int = 0
    head: int = 0
    fleeting: int = 0
    running: int = 0
    moments: tuple[tuple[int, int], ...] = ()
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
    """The most bytes alive at once on the device in a step: what a check before loading should compare with it."""
    return max(phase.device_bytes for phase in by_phase(model, train, method, engine, **facts))


def by_phase(
    model: schema.Model, train: schema.Train, method: schema.Method, engine: schema.Engine, **facts: Unpack[Facts]
) -> list[Phase]:
    """The most bytes of a rank in each phase of a step, by kind, on the device and on the host; see `phases`."""
    case = Case(model, train, method, engine, **facts)
    return phases.of(case, ledger(case), engines.hold(case))


def ledger(case: Case, tape: Tape | None = None) -> Ledger:
    """The saved tensors of one micro-batch. `tape`: of `case`, where it was played already."""
    if not case.trains:
        return Ledger()
    tape = tape or walk.run(case)
    logits = tape.saved["logits"]
    saved = {part: storages for part, storages in tape.saved.items() if part != "logits"}
    blocks, seen = [], set[int]()
    for part, storages in saved.items():
        if part in tape.blocks:
            blocks.append(tape.bytes_of(storages.keys() - seen))
        seen |= storages.keys()
    moments, kept, returns = _backward(case, tape, saved)
    return Ledger(
        kept=tape.bytes_of(kept),
        returns=returns,
        logits=tape.bytes_of(set(logits)),
        head=tape.head,
        fleeting=tape.fleeting,
        running=_running(case, tape, saved),
        moments=_worst(moments),
        blocks=tuple(blocks),
    )


def _backward(case: Case, tape: Tape, saved: dict[str, dict[int, str]]) -> tuple[list[tuple[int, int]], set[int], int]:
    """(moments of the backward pass, what is kept for it, the most that a part of it brings back)."""
    policies = dict(zip(tape.blocks, case.policies, strict=False))
    all_read = sum(tape.read.values())
    kept: set[int] = set()
    moments: list[tuple[int, int]] = []
    returns = before = 0
    for part, storages in saved.items():
        own = tape.inputs[part] if policies.get(part) == "block" else storages.keys()
        # what the part saves itself is in its moments; what is kept anyway must not count twice
        base = tape.bytes_of(kept | own) - tape.bytes_of((own - kept) & storages.keys())
        past = (
            tape.past[part] + tape.waiting[part]
        )  # the gradient that goes past a residual block's branches waits while they have theirs
        moments += [(base + past + there, all_read - before - read) for there, read in tape.moments[part]]
        before += tape.read[part]
        kept |= own
        returns = max(returns, base + tape.passing[part] - tape.bytes_of(kept))
    if isinstance(case.model, schema.Transformer) and case.model.tie_embeddings and case.method.kind == "full":
        table = case.model.vocab_size * case.model.hidden_size * case.width  # its second gradient, beside the head's
        moments.append((table + min((base for base, _ in moments), default=0), all_read))
    return moments, kept, returns


def _running(case: Case, tape: Tape, saved: dict[str, dict[int, str]]) -> int:
    """The most of a recomputed block's forward pass that is alive and not kept: the tensors of its widest operator, in
    the MLP the activation function's result, what gates it and their product, or without a gate input and result."""
    policies = dict(zip(tape.blocks, case.policies, strict=False))
    again = [storages for part, storages in saved.items() if policies.get(part) == "block"]
    widest = max((tape.bytes_of({storage}) for storages in again for storage in storages), default=0)
    gated = isinstance(case.model, schema.Transformer) and case.model.family == "llama"
    return (3 if gated else 2) * widest


def _worst(moments: list[tuple[int, int]]) -> tuple[tuple[int, int], ...]:
    """Those than which no other has more of both."""
    found: list[tuple[int, int]] = []
    for moment in sorted(set(moments), reverse=True):
        if not found or moment[1] > found[-1][1]:
            found.append(moment)
    return tuple(found)


def bytes_per_block(model: schema.Transformer, train: schema.Train, method: schema.Method) -> float:
    """Saved bytes of an inner block over B L D: the unit in which papers and `lorafa` compare methods."""
    deep = dataclasses.replace(model, num_layers=2)
    blocks = ledger(Case(deep, train, method, schema.Engine())).blocks
    return blocks[1] / (train.micro_batch * train.length * model.hidden_size)
