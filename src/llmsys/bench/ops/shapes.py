"""Which operators a training step of a model runs, with their shapes: arithmetic on the config, no torch.

A linear layer of N inputs and M outputs on T tokens is three products, here m x n x k for [m, k] by [k, n]:

    y  = x W^T      T x M x N     gemm       both operands are read along k, as they lie
    dx = dy W       T x N x M     gemm_nn
    dW = dy^T x     M x N x T     gemm_tn

Letters: B batch, L length, T = B L tokens, H heads, W width of a head, D model width, V vocabulary.
"""

from __future__ import annotations

from typing import NamedTuple

from llmsys import schema
from llmsys.cost import shapes
from llmsys.profile import taxonomy

PRODUCTS = ("gemm", "gemm_nn", "gemm_tn")
RMS_FAMILIES = ("llama", "t5")


class Gemm(NamedTuple):
    """[m, k] by [k, n]; `op` of `PRODUCTS`; `rows` of `profile.taxonomy` that have it."""

    op: str
    m: int
    n: int
    k: int
    rows: tuple[str, ...] = ()

    @property
    def flops(self) -> float:
        return 2.0 * self.m * self.n * self.k

    @property
    def key(self) -> str:
        return f"{self.op}/{self.m}x{self.n}x{self.k}"


class Attention(NamedTuple):
    """q [B, H, queries, W] on k, v [B, kv_heads, keys, W]."""

    batch: int
    heads: int
    kv_heads: int
    queries: int
    keys: int
    width: int
    causal: bool

    @property
    def product_flops(self) -> float:
        """Of one of the two products, the whole square."""
        return 2.0 * self.batch * self.heads * self.queries * self.keys * self.width

    @property
    def shape(self) -> str:
        return f"{self.batch}x{self.heads}x{self.queries}x{self.keys}x{self.width}"


def gemms(model: schema.Transformer, train: schema.Train) -> list[Gemm]:
    """Every product of the linear layers and of a head over a vocabulary, each shape once, forward ones first."""
    found: dict[tuple[str, int, int, int], dict[str, None]] = {}
    layers = [(layer.name, layer.n_in, layer.n_out, _tokens(layer.name, model, train)) for layer in _layers(model)]
    for index, op in enumerate(PRODUCTS):
        for name, n, m, t in layers:
            shape = ((t, m, n), (t, n, m), (m, n, t))[index]
            found.setdefault((op, *shape), {})[taxonomy.layer(name)] = None
    return [Gemm(*shape, tuple(rows)) for shape, rows in found.items()]


def _layers(model: schema.Transformer) -> list[shapes.Linear]:
    layers = shapes.linears(model)
    if model.objective == "classification":
        return layers
    return [*layers, shapes.Linear("lm_head", model.hidden_size, model.vocab_size)]


def _tokens(name: str, model: schema.Transformer, train: schema.Train) -> int:
    """Rows that a layer sees: a T5's decoder the target's, but for what reads the encoder."""
    source, target = train.micro_batch * train.length, train.micro_batch * train.target_length
    of_source = not name.startswith("decoder.") or name.endswith(("EncDecAttention.k", "EncDecAttention.v"))
    return source if model.family != "t5" or (of_source and name != "lm_head") else target


def attentions(model: schema.Transformer, train: schema.Train) -> list[Attention]:
    """Of all blocks; T5 has three kinds."""
    heads, kv, batch = model.num_heads, model.num_kv_heads, train.micro_batch
    width, length, target = model.head_width, train.length, train.target_length
    if model.family != "t5":
        return [Attention(batch, heads, kv, length, length, width, model.objective == "causal_lm")]
    kinds = [(length, length, False), (target, target, True), (target, length, False)]
    return [Attention(batch, heads, kv, queries, keys, width, causal) for queries, keys, causal in kinds]


def softmaxes(model: schema.Transformer, train: schema.Train) -> list[tuple[int, int, str]]:
    """(rows, columns, dtype): attention's probabilities, B H L of them, and over the vocabulary in the loss."""
    dtype = "fp32" if model.family == "llama" else train.precision
    found = [(a.batch * a.heads * a.queries, a.keys, dtype) for a in attentions(model, train)]
    if model.objective != "classification":
        found.append((_tokens("lm_head", model, train), model.vocab_size, "fp32"))
    return list(dict.fromkeys(found))


def norms(model: schema.Transformer, train: schema.Train) -> tuple[str, int, int]:
    """(`rms_norm` or `layer_norm`, rows, columns) of a block's norms."""
    kind = "rms_norm" if model.family in RMS_FAMILIES else "layer_norm"
    return kind, train.micro_batch * train.length, model.hidden_size
