"""What each module of a step has to read and write at least: every operand once, every result once.

An implementation in several passes over memory moves more, which is what the roofline is to show: transformers' RMSNorm
reads its input four times. By row of `profile.taxonomy`, of all blocks and micro-batches of an optimizer step of a
rank. T rows (tokens), D model width, M MLP width, V vocabulary, H and K heads of queries and of keys, W width of a
head, w bytes of an activation, p of a weight:

    linear layer      forward w T (in + out) + p in out       backward the same, and once more for the weight's gradient
    norm              2 w T D                                  3 w T D
    rope              2 w T (H + K) W                          the same
    scores            w T (H + K) W + w B H L L                2 of the first, 1 of the second
    softmax           2 w B H L L                              3
    context           w B H L L + w T (H + K) W                2 of each
    attention         w T (2 H + 2 K) W                        w T (4 H + 4 K) W
    activation        gated 3 w T M, else 2                    5, else 3
    residual          6 w T D of a block                       the same: gradients are added
    embedding         2 w T D                                  w T D + p V D, its gradient is as large as the table
    loss              w T V                                    2 w T V
    logits+loss       2 w T D + 2 p V D                        the same
    optimizer         3 p for each trained weight, which is read and written, and its gradient, which is read; and twice
                      the state that `cost.engines` has for `train.optimizer`, read and written: AdamW's two moments

Rows that are not here (dropout, what a model does between its modules, chains of functions) have no bytes of their own.
"""

from __future__ import annotations

from collections import defaultdict
from typing import NamedTuple

from llmsys import schema
from llmsys.cost import engines, shapes
from llmsys.cost.case import Case
from llmsys.profile import taxonomy

OUTSIDE = ("embedding", "logits", "loss", "logits+loss", "optimizer")
"""Rows that no block has, and that are not computed again with one."""
ROTARY = ("llama",)
UNKNOWN = ("t5",)
"""Whose blocks are not all alike: of these only linear layers are known."""


class Bytes(NamedTuple):
    """Of one row in a step."""

    forward: float = 0.0
    backward: float = 0.0
    recompute: float = 0.0


def bytes_by_row(case: Case) -> dict[str, Bytes]:
    """Row -> bytes; {} for a model that is no transformer."""
    model = case.model
    if not isinstance(model, schema.Transformer):
        return {}
    found: dict[str, list[float]] = defaultdict(lambda: [0.0, 0.0])
    _linears(case, model, found)
    if model.family not in UNKNOWN:
        _blocks(case, model, found)
        _ends(case, model, found)
    found["optimizer"][0] = _update(case)
    times = schema.accumulation(case.train, case.engine)
    again = sum(policy == "block" for policy in case.policies) / max(1, len(case.policies))
    made = {}
    for row, (forward, backward) in found.items():
        if row == "optimizer":
            made[row] = Bytes(forward)
        else:
            made[row] = Bytes(times * forward, times * backward, times * forward * again * (row not in OUTSIDE))
    return made


def _update(case: Case) -> float:
    """Of AdamW in 8 bits a moment is a byte and a share of its scale, small tensors' are fp32; its tables are read."""
    held = engines.hold(case)
    tables = engines.TABLES if case.train.optimizer == "adamw_8bit" else 0
    weights = sum(p.nbytes for p in shapes.held(case) if p.trained)
    return 3.0 * weights + 2.0 * (held.optimizer + held.master) - min(tables, held.optimizer)


def _linears(case: Case, model: schema.Transformer, found: dict[str, list[float]]) -> None:
    """Adapters are left out: their width is small."""
    trained, width, tokens = case.method.kind == "full", case.product_width, _tokens(case)
    layers = list(shapes.linears(model))
    if model.objective != "classification" and case.train.loss != "chunked":
        layers.append(shapes.Linear("lm_head", model.hidden_size, model.vocab_size))
    for layer in layers:
        row, whole = taxonomy.layer(layer.name), trained and (model.quant == "none" or layer.name == "lm_head")
        size = layer.n_in * layer.n_out
        kept = shapes.packed_bytes(size, model.quant) if model.quant != "none" and row != "logits" else size * width
        once = float(width * tokens * (layer.n_in + layer.n_out) + kept)
        found[row][0] += once
        found[row][1] += once * (1 + whole)


def _blocks(case: Case, model: schema.Transformer, found: dict[str, list[float]]) -> None:
    width, tokens, blocks = case.product_width, _tokens(case), len(case.policies)
    queries = float(width * tokens * model.num_heads * model.head_width)
    keys = float(width * tokens * model.num_kv_heads * model.head_width)
    square = float(width * case.train.micro_batch * model.num_heads * case.train.length**2)
    hidden, inner = float(width * tokens * model.hidden_size), float(width * tokens * model.intermediate_size)
    gated = model.family in ROTARY
    each = {
        "norm": (2 * 2 * hidden, 2 * 3 * hidden),
        "activation": (3 * inner, 5 * inner) if gated else (2 * inner, 3 * inner),
        "residual": (6 * hidden, 6 * hidden),
    }
    if model.attention == "eager":
        each["scores"] = (queries + keys + square, 2 * (queries + keys) + square)
        each["softmax"] = (2 * square, 3 * square)
        each["context"] = (square + queries + keys, 2 * (square + queries + keys))
    else:
        each["attention"] = (2 * (queries + keys), 4 * (queries + keys))
    if gated:
        each["rope"] = (2 * (queries + keys), 2 * (queries + keys))
    for row, (forward, backward) in each.items():
        found[row][0] += blocks * forward
        found[row][1] += blocks * backward
    found["norm"][0] += 2 * hidden  # behind the blocks, or before them
    found["norm"][1] += 3 * hidden


def _ends(case: Case, model: schema.Transformer, found: dict[str, list[float]]) -> None:
    width, tokens = case.product_width, _tokens(case)
    hidden, table = float(width * tokens * model.hidden_size), float(case.width * model.vocab_size * model.hidden_size)
    found["embedding"][0] += 2 * hidden
    if case.method.kind == "full":
        found["embedding"][1] += hidden + table
    if model.objective == "classification":
        return
    if case.train.loss == "chunked":
        found["logits+loss"][0] += 2 * hidden + 2 * table
        found["logits+loss"][1] += 2 * hidden + 2 * table
    else:
        logits = float(width * tokens * model.vocab_size)
        found["loss"][0] += logits
        found["loss"][1] += 2 * logits


def _tokens(case: Case) -> int:
    return case.train.micro_batch * case.train.length
