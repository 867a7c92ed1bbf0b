"""One forward pass of each family, as `tape.Tape` sees it. The order of calls is that of transformers' own modules.

Letters: B batch, L length, T = B L tokens, D model width, H heads, K width of keys and values, F feed-forward width,
V vocabulary, C classes, r low-rank width.

What one llama block keeps follows, in bytes over T*D for bf16 with fused attention, phi = F/D, kappa = K/D:

    two norms       2 x 4 (fp32 copies), and 2 x 2 (normalised x) if norm weights are trained
    attention       2 + 2 kappa + 2 (q, k, v, output), and 4 H/D (log-sum-exp)
    SwiGLU          3 x 2 phi (gate, silu(gate), up)
    linear inputs   full: 2 + 2 + 2 phi (attention's and the MLP's normed x, down's input; o's is attention's output)
                    LoRA in bf16: the same; in fp32: six copies of 4, one of 4 phi, because each adapter casts its own
                    LoRA-FA: none, for dA is not wanted
    adapters        z = A x: the width of the adapter x r/D each, seven of them

so full = 20 + 4 kappa + 8 phi and LoRA-FA = 12 + 4 kappa + 6 phi + 14 r/D, with 4 H/D to each: `tests/cost` asserts
the published rows. In fp32 the norm's "copy" is x itself and everything else doubles. Eager attention keeps, instead
of the log-sum-exp, B H L L probabilities: 4 bytes in fp32, and 2 more for their bf16 copy. A BERT block keeps 8 tensors
of T*D (x, q, k, v, attention's output, two sums before the norms, the MLP's input) and 2 of T*F (gelu's input and
output).

The first block is cheaper where the embedding is frozen: its input needs no gradient, so its first norm, and whatever
lies before the first trained weight, keeps nothing.
"""

from __future__ import annotations

from dataclasses import dataclass

from llmsys import schema
from llmsys.cost import shapes
from llmsys.cost.tape import Tape, Tensor


@dataclass(frozen=True, kw_only=True)
class Setting:
    """What a walk depends on besides the shape. `padded`: batches carry an attention mask."""

    batch: int
    length: int
    method: schema.Method
    autocast: bool
    padded: bool
    cuda: bool
    num_labels: int

    def mask_bytes(self, model: schema.Model) -> int:
        """The attention mask that all blocks share: boolean for fused kernels, in the hidden states' width for eager.

        transformers hands it to a BERT block as an argument, so recomputation keeps it; to a llama block it is bound.
        """
        if not self.padded or model.family != "bert":
            return 0
        width = 1 if model.attention != "eager" else 2 if model.dtype == "bf16" else 4
        return self.batch * self.length * self.length * width


def run(model: schema.Model, setting: Setting) -> tuple[Tape, Tensor]:
    """Plays one forward pass with its loss. Parts: `embedding`, `block<i>`, `head`, `logits`. Also a block's input."""
    tape = Tape(autocast=setting.autocast, cuda=setting.cuda)
    walker = _Walker(model, setting, tape)
    return tape, walker.llama() if model.family == "llama" else walker.bert()


class _Walker:
    def __init__(self, model: schema.Model, setting: Setting, tape: Tape) -> None:
        self.model, self.setting, self.tape = model, setting, tape
        self.width = 2 if model.dtype == "bf16" else 4
        self.trained = setting.method.kind == "full"
        self.tokens = setting.batch * setting.length
        self.layers = {linear.name: linear for linear in shapes.linears(model)}
        self.adapted = shapes.adapted(model, setting.method)

    def llama(self) -> Tensor:
        m, tape = self.model, self.tape
        head_dim = m.hidden_size // m.num_heads
        tape.part = "embedding"
        h = block_input = self.embed(self.tokens)
        rotary = [tape.new(self.setting.length * head_dim, self.width, False) for _ in ("cos", "sin")]
        for i in range(m.num_layers):
            tape.part = f"block{i}"
            x = tape.rms_norm(h, self.tokens, self.trained)
            q = self.rotate(self.linear("self_attn.q_proj", x), rotary)
            k = self.rotate(self.linear("self_attn.k_proj", x), rotary)
            v = self.linear("self_attn.v_proj", x)
            h = tape.add(h, self.linear("self_attn.o_proj", self.attention(q, k, v)))
            x = tape.rms_norm(h, self.tokens, self.trained)
            gate = tape.pointwise(self.linear("mlp.gate_proj", x))
            h = tape.add(h, self.linear("mlp.down_proj", tape.multiply(gate, self.linear("mlp.up_proj", x))))
        tape.part = "head"
        x = tape.rms_norm(h, self.tokens, self.trained)
        logits = tape.linear(x, m.hidden_size, m.vocab_size, self.width, self.trained)
        self.loss(logits, self.tokens)
        return block_input

    def bert(self) -> Tensor:
        m, tape, p = self.model, self.tape, self.model.dropout
        tape.part = "embedding"
        h = self.embed(self.tokens + self.setting.length)  # token ids, and one row of type ids
        h = block_input = tape.dropout(tape.layer_norm(h, self.tokens, self.trained), p)
        for i in range(m.num_layers):
            tape.part = f"block{i}"
            q, k, v = (self.linear(f"attention.self.{name}", h) for name in ("query", "key", "value"))
            out = tape.dropout(self.linear("attention.output.dense", self.attention(q, k, v)), p)
            h = tape.layer_norm(tape.add(out, h), self.tokens, self.trained)
            middle = tape.pointwise(self.linear("intermediate.dense", h))
            out = tape.dropout(self.linear("output.dense", middle), p)
            h = tape.layer_norm(tape.add(out, h), self.tokens, self.trained)
        tape.part = "head"
        mean_width = tape.operand(h).width
        if h.grad and self.setting.padded:
            tape.save(tape.new(self.tokens, mean_width, False))  # each token's share in the mean
        if self.setting.padded:
            tape.count(2.0 * self.tokens * m.hidden_size, h.grad)
        else:
            mean_width = h.width
        features = tape.dropout(tape.new(self.setting.batch * m.hidden_size, mean_width, h.grad), p)
        logits = tape.linear(features, m.hidden_size, self.setting.num_labels, self.width, True)
        self.loss(logits, self.setting.batch)
        return block_input

    def embed(self, indices: int) -> Tensor:
        """Rows of a table: dW reads the int64 indices."""
        if self.trained:
            self.tape.save(self.tape.new(indices, 8, False))
        return self.tape.new(self.tokens * self.model.hidden_size, self.width, self.trained)

    def linear(self, name: str, x: Tensor) -> Tensor:
        """A layer of the block, with peft's adapter beside it where the method has one: W x + s B A dropout(x)."""
        tape, layer = self.tape, self.layers[name]
        y = tape.linear(x, layer.n_in, layer.n_out, self.width, self.trained)
        if name not in self.adapted:
            return y
        method = self.setting.method
        assert isinstance(method, schema.Adapter)
        width = 4 if method.dtype == "fp32" else self.width
        x = tape.dropout(tape.cast(x, width), method.dropout)
        z = tape.linear(x, layer.n_in, method.r, width, method.kind == "lora_peft")
        tape.linear(z, method.r, layer.n_out, width, True)
        return tape.new(y.numel, y.width, True)

    def rotate(self, x: Tensor, rotary: list[Tensor]) -> Tensor:
        """x cos + rotate(x) sin: the derivative by x reads cos and sin, one row a position, shared by all layers."""
        if x.grad:
            for table in rotary:
                self.tape.save(table)
        return self.tape.new(x.numel, max(x.width, rotary[0].width), x.grad)

    def attention(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """q, k, v [T, heads x head_dim] -> [T, D]."""
        if self.model.attention == "eager":
            return self.eager(q, k, v)
        tape, b, length = self.tape, self.setting.batch, self.setting.length
        q, k, v = (tape.operand(x) for x in (q, k, v))
        grad = q.grad or k.grad or v.grad
        if self.setting.padded:  # a mask keeps the kernel from reading shared heads: transformers repeats them
            k, v = self.repeat(k), self.repeat(v)
        if self.model.dropout and not tape.cuda:
            return self.math(q, k, v)
        out = tape.new(q.numel, q.width, grad)
        if grad:
            for x in (q, k, v, out, tape.new(b * self.model.num_heads * length, 4, True)):
                tape.save(x)
            if self.setting.padded:  # the boolean mask becomes an additive one, anew in each layer
                tape.save(tape.new(b * length * length, q.width, False))
        product = 2.0 * b * length * length * self.model.hidden_size
        tape.count(2 * product)
        tape.backward[tape.part] += 5 * product * grad  # dq, dk, dv, dP and the scores once more
        return out

    def repeat(self, x: Tensor) -> Tensor:
        """Grouped heads, each copied for the query heads that share it; as they are when there are as many."""
        if self.model.num_kv_heads == self.model.num_heads:
            return x
        return self.tape.new(self.tokens * self.model.hidden_size, x.width, x.grad)

    def eager(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """softmax(q k^T) v with the scores in memory. A batched product reads contiguous copies of its operands."""
        tape = self.tape
        llama = self.model.family == "llama"
        scores = self.batched(q, self.repeat(k), len_out=True)
        # llama's softmax is told fp32; bert's runs in what its input is, which the fp32 mask widens under autocast
        wide = llama or (tape.autocast and (self.setting.padded or tape.cuda))
        p = tape.new(scores.numel, 4 if wide else scores.width, scores.grad)
        if p.grad:
            tape.save(p)
        if llama:
            p = tape.cast(p, q.width)
        p = tape.dropout(p, self.model.dropout)
        out = self.batched(p, self.repeat(v), len_out=False)
        return tape.new(out.numel, out.width, out.grad)

    def batched(self, x: Tensor, y: Tensor, *, len_out: bool, cast: bool = True) -> Tensor:
        """A product of [B, H, ., .] tensors, over head_dim (`len_out`: the result is L x L) or over L."""
        tape, b, length = self.tape, self.setting.batch, self.setting.length
        if cast:
            x, y = tape.operand(x), tape.operand(y)
        if len_out:
            x = tape.new(x.numel, x.width, x.grad)
        y = tape.new(y.numel, y.width, y.grad)
        if y.grad:
            tape.save(x)
        if x.grad:
            tape.save(y)
        tape.count(2.0 * b * length * length * self.model.hidden_size, x.grad, y.grad)
        numel = b * self.model.num_heads * length * length if len_out else self.tokens * self.model.hidden_size
        return tape.new(numel, x.width, x.grad or y.grad)

    def math(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """SDPA's fallback on a CPU with dropout: everything in fp32, each head's keys copied, the scores in memory."""
        tape = self.tape
        width = q.width
        q, k, v = (tape.cast(x, 4) for x in (q, self.repeat(k), self.repeat(v)))
        scores = self.batched(q, k, len_out=True, cast=False)
        p = tape.new(scores.numel, 4, scores.grad)
        if p.grad:
            tape.save(p)
        out = self.batched(tape.dropout(p, self.model.dropout), v, len_out=False, cast=False)
        return tape.cast(out, width)

    def loss(self, logits: Tensor, rows: int) -> None:
        """Cross entropy in fp32: keeps its log-probabilities, 4 bytes x rows x classes, and the int64 labels."""
        tape = self.tape
        tape.part = "logits"
        tape.save(tape.new(logits.numel, 4, logits.grad))
        tape.save(tape.new(rows, 8, False))
