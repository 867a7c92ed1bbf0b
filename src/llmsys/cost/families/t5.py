"""T5: an encoder and a decoder of pre-norm blocks with learnt relative positions (arXiv 1910.10683).

A table of `BUCKETS` distances gives each head a bias that is added to the scores; it belongs to the first block of each
stack and serves all. A fused kernel takes it as its mask, made anew in each layer where it is combined with a mask of
its own: H times the size of another family's. Where the table is trained, a CPU has no fused kernel.

The norm is RMSNorm without a cast of its own: in bf16 it keeps x and the fp32 copy. Nothing is scaled by 1/sqrt(d).
Letters: L source length, M target length, D model width, H heads, F feed-forward width.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from llmsys import schema
from llmsys.cost import work
from llmsys.cost.chains import Beside, Chain, run
from llmsys.cost.families.base import Linear, Shape, weights
from llmsys.cost.pieces import Activation, Dropout, Linears, Norm, Piece, ReLU

if TYPE_CHECKING:
    from llmsys.cost.notes import Tensor
    from llmsys.cost.walk import Walk

BUCKETS = 32


def linears(model: schema.Transformer) -> list[Linear]:
    d, f = model.hidden_size, model.intermediate_size
    found = []
    for stack, attentions in (("encoder", ("SelfAttention",)), ("decoder", ("SelfAttention", "EncDecAttention"))):
        for i in range(model.num_layers):
            block = f"{stack}.block.{i}.layer"
            for j, attention in enumerate(attentions):
                found += [Linear(f"{block}.{j}.{attention}.{name}", d, d) for name in "qkvo"]
            mlp = f"{block}.{len(attentions)}.DenseReluDense"
            found += [Linear(f"{mlp}.wi", d, f), Linear(f"{mlp}.wo", f, d)]
    return found


def parameters(model: schema.Transformer, num_labels: int) -> dict[str, Shape]:
    d = model.hidden_size
    table: dict[str, Shape] = {"shared.weight": (model.vocab_size, d), **weights(linears(model), bias=False)}
    for stack, layers in (("encoder", 2), ("decoder", 3)):
        table[f"{stack}.block.0.layer.0.SelfAttention.relative_attention_bias.weight"] = (BUCKETS, model.num_heads)
        for i in range(model.num_layers):
            table |= {f"{stack}.block.{i}.layer.{j}.layer_norm.weight": (d,) for j in range(layers)}
        table[f"{stack}.final_layer_norm.weight"] = (d,)
    return table


def buffer_bytes(model: schema.Transformer) -> int:
    return 0


def play(walk: Walk) -> None:
    m, tape = walk.transformer, walk.tape
    source = _Stack(walk, "encoder", walk.length, causal=False)
    memory = source.run(source.mask)
    target = _Stack(walk, "decoder", walk.case.train.target_length, causal=True)
    tape.elsewhere("head")
    x = tape.like(target.run(source.mask, memory))  # scaled by 1/sqrt(D) before the tied head
    tape.elsewhere("head")
    walk.loss(walk.head(x, m.hidden_size, m.vocab_size), target.tokens)


class _Stack:
    """The encoder, or the decoder."""

    def __init__(self, walk: Walk, name: str, length: int, *, causal: bool) -> None:
        self.walk, self.tape, self.name, self.length, self.causal = walk, walk.tape, name, length, causal
        self.tokens = walk.batch * length
        # targets carry no mask of their own: their padding comes last, and is no label
        eager = walk.transformer.attention == "eager"
        self.mask = walk.attention_mask(length, length, causal=causal) if eager or not causal else None
        self._sums: dict[bool, Tensor] = {}  # of self-attention (True) and cross-attention, for all chained blocks

    def run(self, mask: Tensor | None, memory: Tensor | None = None) -> Tensor:
        """The final hidden states; a decoder attends to `memory` [B, L, D] under the source's mask."""
        walk, tape, p = self.walk, self.tape, self.walk.model.dropout
        tape.elsewhere(f"{self.name} embedding")
        h = walk.embed(self.tokens * walk.transformer.hidden_size, tape.new(self.tokens, 8, False))
        h = tape.dropout(h, p)
        across = walk.attention_mask(self.length, walk.length) if memory else None
        bias: Tensor | None = None
        cross_bias: Tensor | None = None
        for i in range(walk.transformer.num_layers):
            tape.block(f"{self.name}.block.{i}", h, self.mask, bias, memory, across, cross_bias)
            bias = bias or self._table()
            h = self._attend("layer.0.SelfAttention", h, None, self.mask, bias)
            if memory:
                if cross_bias is None:  # zeros
                    heads = walk.transformer.num_heads
                    cross_bias = tape.new(heads * self.length * walk.length, 2 if tape.autocast else walk.width, False)
                h = self._attend("layer.1.EncDecAttention", h, memory, across, cross_bias)
            h = self._feed_forward(f"layer.{2 if memory else 1}.DenseReluDense", h)
        tape.elsewhere(f"{self.name} norm")
        return tape.dropout(self._norm(h), p)

    def _table(self) -> Tensor:
        """The learnt bias of every pair of positions: a lookup, whose derivative reads the int64 buckets."""
        walk, pairs = self.walk, self.length**2
        if walk.trained:
            self.tape.save(self.tape.new(pairs, 8, False))
        return self.tape.new(walk.transformer.num_heads * pairs, walk.width, walk.trained)

    def _norm(self, x: Tensor) -> Tensor:
        tape, rows = self.tape, x.numel // self.walk.transformer.hidden_size
        wide = x if x.width == 4 else tape.new(x.numel, 4, x.grad)
        tape.uses(x)
        tape.both(work.rms_norm(x.numel, x.width, self.walk.trained), x.grad or self.walk.trained)
        if x.grad:
            tape.save(wide, x, tape.new(rows, 4, True))
        normed = tape.new(x.numel, self.walk.width, x.grad)
        if self.walk.trained:
            tape.save(normed)
        return tape.new(x.numel, self.walk.width, x.grad or self.walk.trained)

    def _attend(self, name: str, h: Tensor, memory: Tensor | None, mask: Tensor | None, bias: Tensor) -> Tensor:
        walk, tape = self.walk, self.tape
        if walk.case.chained:
            return self._attend_chained(name, h, memory, mask, bias)
        x = self._norm(h)
        q = walk.linear(f"{name}.q", x)
        k, v = (walk.linear(f"{name}.{part}", memory or x) for part in "kv")
        if walk.transformer.attention != "eager":
            bias = self._combined(mask, bias, learnt=memory is None)
        out = walk.attention(q, k, v, mask, bias)
        return tape.like(h, tape.dropout(walk.linear(f"{name}.o", out), walk.model.dropout))

    def _attend_chained(self, name: str, h: Tensor, memory: Tensor | None, mask: Tensor | None, bias: Tensor) -> Tensor:
        """As chains of pieces: `llmsys.lorafa.blocks.t5`."""
        walk, norm = self.walk, Norm(self.walk)

        def core(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
            return walk.attention(q, k, v, mask, bias if eager else self._sum(mask, bias, learnt=memory is None))

        eager = walk.transformer.attention == "eager"
        into: Piece = Chain(norm, Linears(walk, *(f"{name}.{part}" for part in "qkv")))
        if memory is not None:
            into = Beside(Chain(norm, Linears(walk, f"{name}.q")), Linears(walk, *(f"{name}.{part}" for part in "kv")))
        out = Chain(Linears(walk, f"{name}.o"), Dropout(walk))
        inputs = (h,) if memory is None else (h, memory)
        return self.tape.like(h, walk.attend(core, [mask, bias], into, out, *inputs))

    def _sum(self, mask: Tensor | None, bias: Tensor, *, learnt: bool) -> Tensor:
        """`_combined` as wide as the products are, made by the stack's first block for all."""
        if learnt not in self._sums:
            self._sums[learnt] = self.tape.operand(self._combined(mask, bias, learnt=learnt))
        return self._sums[learnt]

    def _combined(self, mask: Tensor | None, bias: Tensor, *, learnt: bool) -> Tensor:
        """The bias where the mask allows it, as a fused kernel reads it: a copy, unless zeros meet no mask."""
        tape, heads = self.tape, self.walk.transformer.num_heads
        if mask is None and learnt and self.causal:
            mask = tape.new(self.length**2, 1, False)
        if mask is None:
            return tape.like(bias) if learnt else bias
        if bias.grad:
            tape.save(mask)
        return tape.new(mask.numel * heads, bias.width, bias.grad)

    def _feed_forward(self, name: str, h: Tensor) -> Tensor:
        walk, tape, p = self.walk, self.tape, self.walk.model.dropout
        if walk.case.chained:
            return self._feed_forward_chained(name, h)
        x = tape.dropout(tape.from_output(walk.linear(f"{name}.wi", self._norm(h))), p)
        return tape.like(h, tape.dropout(walk.linear(f"{name}.wo", x), p))

    def _feed_forward_chained(self, name: str, h: Tensor) -> Tensor:
        walk, tape = self.walk, self.tape
        wi, wo = Linears(walk, f"{name}.wi"), Linears(walk, f"{name}.wo")
        bits = not walk.again_mlp and not wo.reads_inputs(True)
        onward: list[Piece] = [ReLU(walk) if bits else Activation(walk), Dropout(walk), wo, Dropout(walk)]
        if walk.again_mlp:
            return tape.like(h, *run(tape, Chain(Norm(walk), wi, *onward), h))
        return tape.like(h, *run(tape, Chain(*onward), *run(tape, Chain(Norm(walk), wi), h)))
