"""What ranks say to each other in an optimizer step, by kind of collective: predicts what `comm.traffic` counts.

`g` bytes of gradients, `w` of weights (each parameter padded to equal shares where it is cut), A micro-batches a step:

    ddp            all_reduce g
    deepspeed 0    all_reduce g
              1    all_reduce g; all_gather of the updated weights. The paper's reduce-scatter (arXiv 1910.02054,
                   section 5) is an all-reduce in DeepSpeed (`use_multi_rank_bucket_allreduce`, on unless changed)
              2    as 1, but A times all_reduce g: gradients are divided after each micro-batch
              3    A times all_gather w and reduce_scatter g. What the backward pass needs again soon is kept (`REUSE`),
                   the rest of w is gathered a second time. In its first micro-batch it does not know that yet
    fsdp2          A times all_gather w, twice with `engine.reshard`; reduce_scatter g once
    tp             A times for each block the all_reduce of [B, L, D] activations: forward behind each matrix that is
                   cut by inputs, backward before each that is cut by outputs (DTensor does it for each matrix, where
                   Megatron-LM does it once for query, key and value); all_gather of the logits, where the head is cut

Under `compress` ddp, deepspeed 0 and 1 say in place of `all_reduce g` what `compressed` has, here on average over the
steps of the run.

Left out, as it is some bytes: norms, losses and flags; adapters' inner widths under `tp`; and averaging batch norms'
statistics.
"""

from __future__ import annotations

import math
from collections import Counter
from typing import Unpack

from llmsys import schema
from llmsys.cost import compressed, links, shapes
from llmsys.cost.case import Case, Facts
from llmsys.cost.shapes import Parameter

REUSE = 1_000_000_000
"""ZeRO-3 keeps a gathered weight that is used again before so many elements of others have been used (DeepSpeed's
`stage3_max_reuse_distance`); on the way to the end of the model and back each of them is used twice."""


def step_payload(
    model: schema.Model, train: schema.Train, method: schema.Method, engine: schema.Engine, **facts: Unpack[Facts]
) -> dict[str, int]:
    """Bytes of the whole tensors of all collectives of a step, by kind, as `comm.traffic` counts them; {} on one rank.

    `facts`: see `Case`. ValueError for an engine or a method that is not known here.
    """
    case = Case(model, train, method, engine, **facts)
    if train.world == 1 or not case.trains:
        return {}
    parameters = shapes.held(case)
    trained = [p for p in parameters if p.trained]
    gradients, micro = sum(p.nbytes for p in trained), schema.accumulation(train, engine)
    if engine.kind == "tp":
        return _tensor_parallel(case, micro)
    if isinstance(engine, schema.FSDP2):
        gathers = micro * (2 if engine.reshard else 1)
        return {
            "all_gather": gathers * sum(_padded(p, train.world) for p in parameters),
            "reduce_scatter": sum(_padded(p, train.world) for p in trained),
        }
    said = Counter(_exchanged(case, trained))
    if not isinstance(engine, schema.DeepSpeed) or engine.zero == 0:
        return dict(said)
    if engine.zero == 1:
        return dict(said + Counter(all_gather=gradients))
    if engine.zero == 2:
        return {"all_reduce": micro * gradients, "all_gather": gradients}
    gathered, behind = 0, 0
    for p in reversed(parameters):
        gathered += (1 if 2 * behind < REUSE else 2) * _round_up(p.numel, train.world) * p.width
        behind += p.numel
    return {
        "all_gather": micro * gathered,
        "reduce_scatter": micro * sum(_round_up(p.numel, train.world) * p.width for p in trained),
    }


def step_traffic(
    model: schema.Model, train: schema.Train, method: schema.Method, engine: schema.Engine, **facts: Unpack[Facts]
) -> dict[str, int]:
    """Bytes that a rank sends in an optimizer step, by kind of collective, where they go around in rings."""
    payload = step_payload(model, train, method, engine, **facts)
    return {kind: round(links.bus_factor(kind, train.world) * nbytes) for kind, nbytes in payload.items()}


def step_seconds(
    line: links.Line,
    model: schema.Model,
    train: schema.Train,
    method: schema.Method,
    engine: schema.Engine,
    **facts: Unpack[Facts],
) -> float:
    """Seconds of a step's collectives over `line`, one after another and none behind computation.

    Each kind as one call: a latency a bucket, where there are many, comes on top.
    """
    payload = step_payload(model, train, method, engine, **facts)
    return sum(line.seconds(kind, nbytes, train.world) for kind, nbytes in payload.items())


def _exchanged(case: Case, trained: list[Parameter]) -> dict[str, int]:
    """Of gradients that every rank has whole."""
    gradients = [(p.name, p.shape, p.width) for p in trained]
    return compressed.mean_bytes(gradients, case.compress, case.train.world, case.train.steps)


def _tensor_parallel(case: Case, micro: int) -> dict[str, int]:
    assert isinstance(case.model, schema.Transformer)
    width = 2 if case.autocast else case.width
    tokens = case.train.micro_batch * case.train.length
    layers = shapes.linears(case.model)
    passes = Counter(layer.cut for layer in layers)
    forward, backward = passes[1], passes[0]
    # a block's forward again, but for its last matrix, which nobody reads
    forward += (passes[1] // case.model.num_layers - 1) * case.policies.count("block")
    found = {"all_reduce": micro * (forward + backward) * tokens * case.model.hidden_size * width}
    if any(p.name == "lm_head.weight" for p in shapes.held(case)) and not case.model.tie_embeddings:
        found["all_reduce"] += micro * tokens * case.model.hidden_size * width
        found["all_gather"] = micro * tokens * case.model.vocab_size * width
    return found


def _padded(parameter: Parameter, world: int) -> int:
    """Bytes of a parameter whose first dimension is a multiple of the world."""
    if not parameter.shape:
        return world * parameter.width
    return _round_up(parameter.shape[0], world) * math.prod(parameter.shape[1:]) * parameter.width


def _round_up(size: int, multiple: int) -> int:
    return math.ceil(size / multiple) * multiple
