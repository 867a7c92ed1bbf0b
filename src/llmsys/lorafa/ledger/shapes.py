"""A model's shape cut down to what a CPU measures in a second, with its ratios kept.

What a block keeps over (batch x length x D) depends on F/D, kv heads / heads, heads / D and r/D alone, and on two
numbers a row, 4/D each. So a model of 4 of 32 heads, an eighth of its width everywhere, has the same coefficients.
"""

from __future__ import annotations

import dataclasses
from fractions import Fraction

from llmsys import schema

VOCABULARY = 64
"""Of a cut model: its logits are not what a block keeps."""


LAYERS = {"t5": 3}
"""Blocks a stack; the last is the inner one. T5's second keeps position biases that serve all behind it too."""


def cut(model: schema.Transformer, r: int, width: int) -> tuple[schema.Transformer, int]:
    """(the model with few blocks, no dropout and the most heads that make it no wider than `width`; its r).

    Where no such number of heads leaves all ratios whole, the fewest that do. r is rounded, to at least 1.
    """
    wholes = [
        Fraction(heads, model.num_heads)
        for heads in range(1, model.num_heads + 1)
        if all(
            (Fraction(heads, model.num_heads) * size).denominator == 1
            for size in (model.num_kv_heads, model.hidden_size, model.intermediate_size)
        )
    ]
    fitting = [share for share in wholes if share * model.hidden_size <= width]
    share = fitting[-1] if fitting else wholes[0]
    small = dataclasses.replace(
        model,
        hidden_size=int(share * model.hidden_size),
        intermediate_size=int(share * model.intermediate_size),
        num_heads=int(share * model.num_heads),
        num_kv_heads=int(share * model.num_kv_heads),
        num_layers=LAYERS.get(model.family, 2),
        vocab_size=VOCABULARY,
        dropout=0.0,
        weights="random",
        tokenizer="bytes",
    )
    return small, max(1, round(share * r))


def variants(model: schema.Transformer) -> dict[str, schema.Transformer]:
    """`mha`, and for llama `gqa` too: the model's own grouping of heads, else 4 queries (or fewer) to a key."""
    if model.family != "llama":
        return {"mha": model}
    own = model.num_heads // model.num_kv_heads
    group = own if own > 1 else next(size for size in (4, 2, 3, 1) if model.num_heads % size == 0)
    mha = dataclasses.replace(model, num_kv_heads=model.num_heads)
    if group == 1:
        return {"mha": mha}
    return {"mha": mha, "gqa": dataclasses.replace(model, num_kv_heads=model.num_heads // group)}
