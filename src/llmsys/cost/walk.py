"""What the families' forward passes have in common: embeddings, linear layers with their adapters, attention, the loss.

A family's `play` calls these in the order of transformers' own modules. Letters: B batch, L length, T = B L tokens,
D model width, H heads, V vocabulary, C classes, r low-rank width.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Hashable, Sequence

from llmsys import schema
from llmsys.cost import chains, cores, pieces, shapes
from llmsys.cost.attention import Attention
from llmsys.cost.case import Case
from llmsys.cost.chains import Chain
from llmsys.cost.families import FAMILIES, Linear
from llmsys.cost.kept import Kept
from llmsys.cost.notes import Tensor
from llmsys.cost.tape import Tape
from llmsys.cost.work import FORWARD, Op


def run(case: Case) -> Tape:
    """Plays the forward pass of a micro-batch, with its loss. Parts: `embedding`, each block, `head`, `logits`. The
    tape is kept for the next case of which it is too: nobody may change it."""
    return _kept(case)


def _play(case: Case) -> Tape:
    walk = Walk(case)
    FAMILIES[case.model.family].play(walk)
    return walk.tape


def _read(case: Case) -> tuple[Hashable, ...]:
    """What a pass depends on: nothing of how ranks share the work but what ZeRO does to a layer, and cut matrices."""
    train = case.train
    batch = (train.micro_batch, train.length, train.target_length, train.precision)
    ways = (train.recompute, train.loss, train.fp8, min(case.zero, 1), case.zero == 3, case.cut)
    facts = (case.num_labels, case.padded, case.device)
    return repr(case.model), repr(case.method), *batch, *ways, *facts


_kept = Kept(_play, _read, 128)


class Walk:
    """One pass in progress: the config, the tape, and the steps that families share."""

    def __init__(self, case: Case) -> None:
        self.case, self.model = case, case.model
        self.tape = Tape(autocast=case.autocast, cuda=case.device == "cuda", zero_3=case.zero == 3)
        self.width, self.batch, self.length = case.width, case.train.micro_batch, case.train.length
        self.tokens = self.batch * self.length
        self.trained = case.method.kind == "full"
        self.trained_layers = self.trained and case.model.quant == "none"  # a quantised layer is frozen
        self._layers = {layer.name: layer for layer in shapes.linears(case.model)}
        self.owners = shapes.owners(case)
        self._policies = case.policies
        self._additive: dict[int, Tensor] = {}  # by the storage of a boolean mask

    @property
    def transformer(self) -> schema.Transformer:
        assert isinstance(self.model, schema.Transformer)
        return self.model

    @property
    def policy(self) -> str:
        """What the current block computes again."""
        return self._policies[len(self.tape.blocks) - 1]

    @property
    def again_mlp(self) -> bool:
        """Whether a chained block's MLP is computed again."""
        return self.policy in ("mlp", "attn+mlp")

    def layer(self, name: str) -> Linear:
        """A linear layer of the current block."""
        return self._layers[f"{self.tape.part}.{name}"]

    def widened(self, numel: int) -> float:
        """Bytes that are read and written to make a quantised weight wide."""
        return shapes.packed_bytes(numel, self.model.quant) + float(numel * (2 if self.tape.autocast else self.width))

    def embed(self, numel: int, *indices: Tensor) -> Tensor:
        """The sum of rows of tables, `numel` elements: dW reads the int64 indices."""
        if self.trained:
            self.tape.save(*indices)
        table = self.model.vocab_size * self.model.hidden_size if isinstance(self.model, schema.Transformer) else 0
        self.tape.streams(
            2.0 * numel * self.width * len(indices), (table + 3.0 * numel) * self.width, launches=(2, 2 * self.trained)
        )
        return self.tape.new(numel, self.width, self.trained)

    def linear(self, name: str, x: Tensor) -> Tensor:
        """A layer of the current block, with an adapter beside it where the method has one: W x + s B A dropout(x).

        A quantised weight is frozen and kept in its own few bits, so nothing is saved for it.
        """
        with self.tape.within(self.layer(name).name):
            return self._linear(name, x)

    def _linear(self, name: str, x: Tensor) -> Tensor:
        tape, adapter = self.tape, self.case.adapter
        layer = self.layer(name)
        if self.case.fused and layer.name in self.owners:
            return chains.run(tape, pieces.Linears(self, name), x)[0]
        n_in = layer.n_in // (self.case.cut if layer.cut == 1 else 1)
        n_out = layer.n_out // (self.case.cut if layer.cut == 0 else 1)
        fp8 = self.case.train.fp8 and layer.n_in % 16 == layer.n_out % 16 == 0
        ours = self.model.quant != "none" or fp8  # products of our own, which keep no copy of a weight
        if not ours and self.model.family != "gpt2":
            y = tape.linear(x, n_in, n_out, self.width, self.trained_layers)
        else:  # those, or GPT-2's own `Conv1D`
            if self.model.quant != "none":  # made wide for the product, and again for its derivative
                packed = self.widened(n_in * n_out)
                tape.streams(packed, packed, launches=(2, 2 * x.grad), kind="dequant")
            rows, width, before = x.numel // n_in, 0 if ours else self.width, len(tape.ops[tape.part])
            y = tape.product(x, n_in * n_out, rows * n_out, 2.0 * rows * n_in * n_out, width, self.trained_layers)
            if fp8:
                self._eighths(before, x.numel, n_in * n_out, y.numel)
        if layer.name not in self.owners:
            return y
        assert adapter is not None
        width = self.case.adapter_width
        own = tape.dropout(tape.cast(x, width), adapter.dropout)
        z = tape.linear(own, n_in, adapter.r, width, adapter.kind == "lora_peft")
        grown = tape.linear(z, adapter.r, n_out, width, True)
        # scaled and added; B's way back scaled too
        tape.streams(3 * grown.nbytes + 2 * y.nbytes, 2 * grown.nbytes, launches=(2, 1))
        # the gradient scaled and cast for B's way, while a gate's waits; then x's from both ways, summed in place
        tape.passes(3 * y.nbytes, 2 * grown.nbytes * (grown.width > y.width))
        tape.passes(tape.coming(y.nbytes), own.nbytes * x.grad, x.nbytes * x.grad)
        return tape.new(y.numel, y.width, True)

    def _eighths(self, before: int, n_x: int, n_w: int, n_y: int) -> None:
        """The part's products from `before` on in 8-bit floats, with what makes their operands narrow: the largest
        element is looked for, then all are cast."""
        own = self.tape.ops[self.tape.part]
        own[before:] = [op._replace(width=1) if op.kind == "product" else op for op in own[before:]]
        each = 2 * self.case.product_width + 1.0
        self.tape.streams(each * (n_x + n_w), each * (n_y + n_x + n_w), launches=(4, 6))

    def head(self, x: Tensor, n_in: int, n_out: int) -> Tensor:
        """Logits of a language model. Under tensor parallelism each rank multiplies its share of the vocabulary, unless
        the table is the embedding's, and then has all logits. With `train.loss=chunked` it makes the loss itself."""
        with self.tape.within("lm_head"):
            return self._head(x, n_in, n_out)

    def _head(self, x: Tensor, n_in: int, n_out: int) -> Tensor:
        if self.case.train.loss == "chunked":
            return self._chunked(x, n_in, n_out)
        share = n_out if self.transformer.tie_embeddings else -(-n_out // self.case.cut)
        logits = self.tape.linear(x, n_in, share, self.width, self.trained)
        return self.tape.new(x.numel // n_in * n_out, logits.width, logits.grad)

    def attention_mask(self, queries: int, keys: int, *, causal: bool = False) -> Tensor | None:
        """What transformers makes of a batch's mask and hands to every block: [B, 1, queries, keys], boolean for fused
        kernels, of the hidden states' width for eager. Without a batch's mask there is one where eager attention has to
        be told what is causal."""
        eager = self.transformer.attention == "eager"
        if not self.case.masked and not (eager and causal):
            return None
        return self.tape.new(self.batch * queries * keys, self.width if eager else 1, False)

    def attention(self, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, bias: Tensor | None = None) -> Tensor:
        """q [B queries, heads x head_dim], k, v [B keys, kv_heads x head_dim] -> like q. See `attention.Attention`.

        In chained blocks (`llmsys.lorafa.blocks.kernel`) a fused kernel's mask is made of a boolean one once for all
        blocks, and where there is none for dropout on the probabilities, the scores are computed again.
        """
        with self.tape.within("@attention"):
            return self._attention(q, k, v, mask, bias)

    def _attention(self, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, bias: Tensor | None) -> Tensor:
        attention, chained = Attention(self.case, self.tape, q, k), self.case.chained
        if not chained or self.transformer.attention == "eager":
            return attention(q, k, v, mask, bias)
        q, k, v = (self.tape.operand(x) for x in (q, k, v))
        if bias is None and mask is not None:
            if mask.storage not in self._additive:
                self._additive[mask.storage] = self.tape.new(mask.numel, q.width, False)
            bias = self._additive[mask.storage]
        if self.model.dropout and not self.tape.cuda:
            return chains.run(self.tape, cores.Scores(self, bias, attention.flops(q)), q, k, v)[0]
        return attention(q, k, v, mask, bias)

    def attend(
        self,
        core: Callable[..., Tensor],
        held: Sequence[Tensor | None],
        into: pieces.Piece,
        out: pieces.Piece,
        *inputs: Tensor,
    ) -> Tensor:
        """out(core(into(inputs))) of a chained block, under `attn+mlp` in one chain; `held`: what else `core` reads."""
        if self.policy == "attn+mlp":
            return chains.run(self.tape, Chain(into, cores.Core(self, core, *held), out), *inputs)[0]
        return chains.run(self.tape, out, core(*chains.run_apart(self.tape, into, *inputs)))[0]

    def loss(self, logits: Tensor, rows: int) -> None:
        """Cross entropy in fp32: keeps its log-probabilities, 4 bytes x rows x classes, and the int64 labels; nothing
        where the head has made the loss."""
        self.tape.elsewhere("logits")
        if self.case.train.loss == "chunked" and self.model.objective in ("causal_lm", "seq2seq"):
            return
        if logits.grad:
            self.tape.head = logits.nbytes
            if logits.width < 4:
                self.tape.streams(6 * logits.numel, 6 * logits.numel)
            self.tape.streams(8 * logits.numel, 12 * logits.numel, launches=(3, 3), kind="exp")
            self.tape.streams(0, 4 * logits.numel, launches=(0, 1))
            self.tape.save(self.tape.new(logits.numel, 4, True), self.tape.new(rows, 8, False))

    def _chunked(self, x: Tensor, d: int, v: int) -> Tensor:
        """`models.linear_cross_entropy`: keeps the gradients, dh as wide as the products are and dW, under `logits`.

        `tape.fleeting` is the most that it needs besides, either in the forward pass (h, a chunk of its rows and of the
        logits, these once more in fp32, and where weights are narrower than fp32 the sum of dW) or in the backward pass
        (the scaled gradients).
        """
        tape, rows = self.tape, x.numel // d
        narrow = 2 if self.case.autocast else x.width
        chunk = max(math.ceil(rows / math.ceil(v / d)), min(rows, math.ceil(d / 4)) if self.trained else 0) * v
        tape.elsewhere("logits")
        forward = x.numel * x.width + chunk // v * d * narrow
        backward = 0
        if self.case.autocast:  # the weight
            forward += v * d * narrow
        if x.grad:
            tape.save(tape.new(x.numel, narrow, True))
            backward += x.numel * (x.width if x.width == narrow else x.width + narrow)
        during = chunk * (4 if narrow == 4 else 4 + narrow)
        if self.trained:
            tape.save(tape.new(v * d, self.width, True))
            backward += v * d * self.width
            product = v * d * narrow if narrow < 4 else 0
            summed = v * d * (4 - self.width)  # before the gradient that is kept is there, its sum in fp32 is
            during = max(summed + max(during, chunk * narrow + product), v * d * 4 if self.width < 4 else 0)
        tape.fleeting = max(forward + during, backward)
        flops = 2.0 * rows * d * v
        self._chunked_ops(rows, d, v, chunk // v, narrow, x.grad)
        tape.count(flops * (1 + x.grad + self.trained))  # all in the forward pass
        return tape.new(1, 4, x.grad or self.trained)

    def _chunked_ops(self, rows: int, d: int, v: int, chunk: int, narrow: int, grad: bool) -> None:
        """Of a chunk of rows at a time: logits, their softmax, and the products with their gradient."""
        tape, number, products = self.tape, -(-rows // chunk), 1 + grad + self.trained
        nbytes = float(products * narrow * (rows * (d + v) + number * d * v))
        tape.ops[tape.part].append(
            Op(FORWARD, "product", 2.0 * rows * d * v * products, nbytes, number * products, 1, narrow)
        )
        tape.streams((24.0 + 2 * narrow) * rows * v, 2.0 * narrow * rows * d, launches=(5 * number, 1), kind="exp")
