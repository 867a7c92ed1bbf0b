"""What a forward pass has to do at least when it serves: arithmetic, and bytes read and written, by row of
`profile.taxonomy`. A prefill has many new tokens and none before; a decoding step one new token of each sequence, and
keys and values of all that came before it.

T = B n new tokens of B sequences with k keys each (those before and the new ones), D model width, M MLP width, V
vocabulary, H and K heads of queries and of keys, W width of a head, w bytes of an activation and of the cache, p of a
weight (`cost.shapes`: packed, with its scales), N blocks:

    linear layer      2 T in out FLOPs          w T (in + out) + p in out bytes
    attention         4 W H pairs               w (2 T H W + 2 B K W k): queries, results, the cache, once each
    cache             0                         w 2 T K W: what is written into it
    norm              0                         2 w T D
    rope              0                         2 w T (H + K) W
    activation        0                         gated 3 w T M, else 2
    residual          0                         6 w T D of a block
    embedding         0                         2 w T D
    logits            2 B D V                   w B (D + V) + p D V: of the last token of each sequence alone

pairs = B (n k - n (n - 1) / 2): with a causal mask the i-th of n new tokens looks at all but the n - i after it.
"""

from __future__ import annotations

from typing import NamedTuple

from llmsys import schema
from llmsys.cost import shapes

BYTES = {"fp32": 4.0, "bf16": 2.0}
DTYPES = {"fp32": "float32", "bf16": "bfloat16"}
"""As servers call them."""


class Work(NamedTuple):
    """FLOPs, and bytes."""

    flops: float = 0.0
    nbytes: float = 0.0

    def least_s(self, flops_per_s: float, bytes_per_s: float) -> float:
        """On its roofline (Williams et al., 2009)."""
        return max(self.flops / flops_per_s, self.nbytes / bytes_per_s)


def by_row(model: schema.Transformer, batch: int, new: int, before: int = 0) -> dict[str, Work]:
    """Of all blocks and the head, for `new` tokens of each of `batch` sequences, `before` of which are in the cache.
    ValueError for a model that generates no text."""
    if model.objective != "causal_lm":
        raise ValueError(f"model={model.name}: generates no text; e.g. model=llama_6m")
    w = BYTES[model.dtype]
    tokens, keys, blocks = batch * new, before + new, model.num_layers
    d, m, heads, kv = model.hidden_size, model.intermediate_size, model.num_heads, model.num_kv_heads
    width = model.head_width
    pairs = batch * (new * keys - new * (new - 1) / 2)

    def linear(rows: float, ins: int, outs: int, quant: str = model.quant) -> Work:
        return Work(2.0 * rows * ins * outs, w * rows * (ins + outs) + _weight(ins * outs, outs, quant, w))

    gated = model.family == "llama"
    block = {
        "qkv": linear(tokens, d, (heads + 2 * kv) * width),
        "attention": Work(4.0 * width * heads * pairs, w * (2 * tokens * heads + 2 * batch * kv * keys) * width),
        "cache": Work(0.0, w * 2 * tokens * kv * width),
        "output": linear(tokens, heads * width, d),
        "up": linear(tokens, d, m),
        "down": linear(tokens, m, d),
        "norm": Work(0.0, 2 * 2 * w * tokens * d),
        "residual": Work(0.0, 6 * w * tokens * d),
        "activation": Work(0.0, (3 if gated else 2) * w * tokens * m),
    }
    if gated:
        block["gate"] = linear(tokens, d, m)
        block["rope"] = Work(0.0, 2 * w * tokens * (heads + kv) * width)
    found = {row: Work(blocks * each.flops, blocks * each.nbytes) for row, each in block.items()}
    found["norm"] = Work(0.0, found["norm"].nbytes + 2 * w * tokens * d)
    found["embedding"] = Work(0.0, 2 * w * tokens * d)
    found["logits"] = linear(batch, d, model.vocab_size, "none")
    return found


def whole(rows: dict[str, Work]) -> Work:
    """All of them."""
    return Work(sum(each.flops for each in rows.values()), sum(each.nbytes for each in rows.values()))


def _weight(numel: int, rows: int, quant: str, w: float) -> float:
    return w * numel if quant == "none" else shapes.packed_bytes(numel, quant) + shapes.scale_bytes(numel, rows, quant)


def widened_bytes(model: schema.Transformer) -> float:
    """Written and read again where packed weights of all linear layers are widened before their products."""
    if model.quant == "none":
        return 0.0
    return 2 * BYTES[model.dtype] * sum(each.n_in * each.n_out for each in shapes.linears(model))


def cache_bytes(model: schema.Transformer, tokens: int) -> float:
    """Of keys and values of so many tokens."""
    return 2.0 * model.num_layers * model.num_kv_heads * model.head_width * tokens * BYTES[model.dtype]


def weight_bytes(model: schema.Transformer) -> float:
    """Of all parameters, those of linear layers as they are packed."""
    w, layers = BYTES[model.dtype], shapes.linears(model)
    packed = sum(_weight(each.n_in * each.n_out, each.n_out, model.quant, w) for each in layers)
    return w * (shapes.num_params(model) - sum(each.n_in * each.n_out for each in layers)) + packed
