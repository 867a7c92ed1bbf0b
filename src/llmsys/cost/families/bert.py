"""BERT and RoBERTa: post-norm encoder blocks (arXiv 1810.04805, 1907.11692), and a head that classifies.

A block keeps 8 tensors of T*D (x, q, k, v, attention's output, two sums before the norms, the MLP's input) and 2 of T*F
(gelu's input and output). Letters: L length, T = B L tokens, D model width, F feed-forward width.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from llmsys import schema
from llmsys.cost.chains import Branch, Chain, Residual, run
from llmsys.cost.families.base import Linear, Shape, norms, weights
from llmsys.cost.pieces import Activation, Dropout, Linears, Norm, Piece

if TYPE_CHECKING:
    from llmsys.cost.notes import Tensor
    from llmsys.cost.walk import Walk


def linears(model: schema.Transformer) -> list[Linear]:
    d, f = model.hidden_size, model.intermediate_size
    return [
        Linear(f"{model.family}.encoder.layer.{i}.{name}", n_in, n_out, cut)
        for i in range(model.num_layers)
        for name, n_in, n_out, cut in (
            ("attention.self.query", d, d, 0),
            ("attention.self.key", d, d, 0),
            ("attention.self.value", d, d, 0),
            ("attention.output.dense", d, d, 1),
            ("intermediate.dense", d, f, 0),
            ("output.dense", f, d, 1),
        )
    ]


def parameters(model: schema.Transformer, num_labels: int) -> dict[str, Shape]:
    """With `num_labels` > 0 the classifier: linear on the mean of the tokens, or the family's own on the first.

    BERT's own head has a pooler before it, which belongs to the encoder.
    """
    d, root = model.hidden_size, model.family
    table: dict[str, Shape] = {
        f"{root}.embeddings.word_embeddings.weight": (model.vocab_size, d),
        f"{root}.embeddings.position_embeddings.weight": (_positions(model), d),
        f"{root}.embeddings.token_type_embeddings.weight": (2 if root == "bert" else 1, d),
        **norms([f"{root}.embeddings.LayerNorm"], d),
        **weights(linears(model), bias=True),
    }
    for i in range(model.num_layers):
        table |= norms((f"{root}.encoder.layer.{i}.{name}.LayerNorm" for name in ("attention.output", "output")), d)
    if model.pooling == "cls" and root == "bert":
        table |= weights([Linear("bert.pooler.dense", d, d)], bias=True)
    if num_labels and model.pooling == "cls" and root == "roberta":
        layers = [Linear("classifier.dense", d, d), Linear("classifier.out_proj", d, num_labels)]
        return {**table, **weights(layers, bias=True)}
    if num_labels:
        table |= weights([Linear("classifier", d, num_labels)], bias=True)
    return table


def _positions(model: schema.Transformer) -> int:
    """RoBERTa's table begins with two rows that no token uses."""
    return model.max_length + 2 * (model.family == "roberta")


def buffer_bytes(model: schema.Transformer) -> int:
    """The ids of the positions and of the token types, int64."""
    return 2 * 8 * _positions(model)


def play(walk: Walk) -> None:
    m, tape, tokens = walk.transformer, walk.tape, walk.tokens
    tape.elsewhere("embedding")
    # BERT's type ids are one row, and its positions a slice of a buffer; RoBERTa counts unmasked tokens of each text
    roberta = m.family == "roberta"
    positions = tape.new(tokens, 8, False) if roberta else None
    ids = [tape.new(tokens, 8, False), tape.new(tokens if roberta else walk.length, 8, False)]
    h = walk.embed(tokens * m.hidden_size, *ids, *([positions] if positions else []))
    h = tape.dropout(tape.layer_norm(h, tokens, walk.trained), walk.model.dropout)
    mask = walk.attention_mask(walk.length, walk.length)
    for i in range(m.num_layers):
        tape.block(f"{m.family}.encoder.layer.{i}", h, mask, positions)
        h = _chained(walk, h, mask, positions) if walk.case.chained else _block(walk, h, mask)
    tape.elsewhere("head")
    walk.loss(_mean_head(walk, h) if m.pooling == "mean" else _first_head(walk, h), walk.batch)


def _block(walk: Walk, h: Tensor, mask: Tensor | None) -> Tensor:
    tape, tokens, p = walk.tape, walk.tokens, walk.model.dropout
    q, k, v = (walk.linear(f"attention.self.{name}", h) for name in ("query", "key", "value"))
    out = tape.dropout(walk.linear("attention.output.dense", walk.attention(q, k, v, mask)), p)
    h = tape.layer_norm(tape.like(out, h), tokens, walk.trained)
    middle = tape.from_input(walk.linear("intermediate.dense", h))
    out = tape.dropout(walk.linear("output.dense", middle), p)
    return tape.layer_norm(tape.like(out, h), tokens, walk.trained)


def _chained(walk: Walk, h: Tensor, mask: Tensor | None, positions: Tensor | None) -> Tensor:
    """As chains of pieces: `llmsys.lorafa.blocks.bert`."""
    tape = walk.tape

    def core(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return walk.attention(q, k, v, mask)

    into = Linears(walk, *(f"attention.self.{name}" for name in ("query", "key", "value")))
    out = Chain(Linears(walk, "attention.output.dense"), Dropout(walk))
    h = tape.like(h, walk.attend(core, [mask, positions], into, out, h))
    norm, into = Norm(walk, "layer"), Linears(walk, "intermediate.dense")
    onward: list[Piece] = [Activation(walk), Linears(walk, "output.dense"), Dropout(walk)]
    if walk.again_mlp:
        (h,) = run(tape, Chain(norm, Residual(tape, Chain(into, *onward))), h)
    else:
        x, gate = run(tape, Chain(norm, Branch(tape, into)), h)
        h = tape.like(x, *run(tape, Chain(*onward), gate))
    return run(tape, Norm(walk, "layer"), h)[0]


def _mean_head(walk: Walk, h: Tensor) -> Tensor:
    features = walk.tape.dropout(_mean(walk, h), walk.model.dropout)
    return walk.tape.linear(features, walk.transformer.hidden_size, walk.case.labels, walk.width, True)


def _first_head(walk: Walk, h: Tensor) -> Tensor:
    """Linear, tanh, linear on the first token, whose memory is that of all. BERT's first layer is the encoder's."""
    tape, d, p = walk.tape, walk.transformer.hidden_size, walk.model.dropout
    roberta = walk.model.family == "roberta"
    first = tape.view(h, walk.batch * d)
    first = tape.dropout(first, p) if roberta else first
    x = tape.from_output(tape.linear(first, d, d, walk.width, walk.trained or roberta))
    return tape.linear(tape.dropout(x, p), d, walk.case.labels, walk.width, True)


def _mean(walk: Walk, h: Tensor) -> Tensor:
    """The mean over unmasked tokens, [B, D]: under a mask a product with each token's share."""
    tape, numel = walk.tape, walk.batch * walk.transformer.hidden_size
    if not walk.case.masked:
        return tape.new(numel, h.width, h.grad)
    width = tape.operand(h).width
    if h.grad:
        tape.save(tape.new(walk.tokens, width, False))
    tape.count(2.0 * walk.tokens * walk.transformer.hidden_size, h.grad)
    return tape.new(numel, width, h.grad)
