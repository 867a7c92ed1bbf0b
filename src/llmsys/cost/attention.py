"""What attention keeps, by kernel: fused, eager, and the fallback that a CPU takes where no fused one serves.

A fused kernel keeps its operands, its output and a log-sum-exp a row, and computes the scores again in the backward
pass. It skips what comes later where it is told that it is causal: transformers does that for decoders of one stack
without a batch's mask, and flash_attention_2 reads lengths where there is one. The others keep the probabilities,
B H L L of them. A CPU falls back where there is dropout, or where the bias on the scores is trained. Letters: B batch,
L length, H heads, D model width.
"""

from __future__ import annotations

from llmsys import schema
from llmsys.cost.case import Case
from llmsys.cost.notes import Tensor
from llmsys.cost.tape import Tape
from llmsys.cost.work import BACKWARD, FORWARD, WHOLE, Op

CAUSAL = ("llama", "gpt2")
"""Families whose attention is a causal kernel's; T5's decoder adds a bias to its scores."""


class Attention:
    """softmax(q k^T + bias) v of one layer, for q [B queries, H head_dim] and k [B keys, kv_heads head_dim]."""

    def __init__(self, case: Case, tape: Tape, q: Tensor, k: Tensor) -> None:
        assert isinstance(case.model, schema.Transformer)
        self.case, self.tape, self.model = case, tape, case.model
        self.batch, self.heads = case.train.micro_batch, case.model.num_heads // case.cut
        head_dim = case.model.head_width
        self.groups = case.model.num_heads // case.model.num_kv_heads
        self.queries = q.numel // (self.batch * self.heads * head_dim)
        self.keys = k.numel * self.groups // (self.batch * self.heads * head_dim)

    def __call__(self, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, bias: Tensor | None) -> Tensor:
        """`mask` as the model has it, [B, 1, queries, keys], a boolean one for fused kernels; `bias`: numbers of which
        it is already a part."""
        if self.model.attention == "eager":
            return self.eager(q, k, v, mask, bias)
        tape = self.tape
        skips = self.model.family in CAUSAL and (mask is None or self.model.attention == "flash_attention_2")
        q, k, v = (tape.operand(x) for x in (q, k, v))
        if bias is not None:
            bias = tape.operand(bias)
        elif mask is not None:  # becomes numbers, anew in each layer
            bias = tape.new(mask.numel, q.width, False)
        if mask is not None:  # a mask keeps the kernel from reading shared heads: transformers repeats them
            k, v = self.repeat(k), self.repeat(v)
        if not tape.cuda and (self.model.dropout or (bias is not None and bias.grad)):
            return self.math(q, k, v)
        return self.fused(q, k, v, bias, skips)

    def fused(self, q: Tensor, k: Tensor, v: Tensor, bias: Tensor | None, skips: bool) -> Tensor:
        """`skips`: the kernel leaves out what comes later."""
        tape, kind = self.tape, "" if skips else WHOLE
        grad = q.grad or k.grad or v.grad
        out = tape.new(q.numel, q.width, grad)
        if grad:
            tape.save(q, k, v, out, tape.new(self.batch * self.heads * self.queries, 4, True))
            if bias is not None:
                tape.save(bias)
            tape.passes(2 * out.nbytes, q.nbytes, k.nbytes, v.nbytes)
        product, nbytes = self.flops(q), q.nbytes + k.nbytes + v.nbytes + out.nbytes
        tape.uses(q, k, v)
        own = tape.ops[tape.part]
        own.append(Op(FORWARD, kind + "attention", 2 * product, nbytes, 1, 1, q.width))
        if grad:
            own.append(Op(BACKWARD, kind + "attention_backward", 5 * product, 2 * nbytes, 1, 1, q.width))
        tape.work(2 * product, 5 * product * grad)  # dq, dk, dv, dP and the scores once more
        return out

    def eager(self, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, bias: Tensor | None) -> Tensor:
        """With the scores in memory. A batched product reads contiguous copies of its operands."""
        tape = self.tape
        llama = self.model.family == "llama"
        with tape.within("@scores"):
            scores = self.scores(q, self.repeat(k))
        tape.streams(2 * scores.nbytes, 2 * scores.nbytes, launches=(1, int(scores.grad)))  # scaled
        if mask is not None or bias is not None:
            tape.streams(3 * scores.nbytes, 0, launches=(1, 0))
        # llama's softmax is told fp32; the others' run in their input's width, to which an fp32 mask or bias may add
        wide = llama or (tape.autocast and (tape.cuda or any(x is not None and x.width == 4 for x in (mask, bias))))
        p = tape.new(scores.numel, 4 if wide else scores.width, scores.grad or (bias is not None and bias.grad))
        self._softmax(p)
        if p.grad:
            tape.save(p)
            tape.passes(2 * p.nbytes)
        if self.model.family in ("llama", "gpt2"):  # which cast back to the dtype of q, and of v
            p = tape.cast(p, q.width if llama else v.width)
        with tape.within("@context"):
            out = self.mix(tape.dropout(p, self.model.dropout), self.repeat(v))
        return tape.like(out)

    def math(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """SDPA's fallback: everything in fp32, each head's keys copied, the scores in memory."""
        tape, width = self.tape, q.width
        q, k, v = (tape.cast(x, 4) for x in (q, self.repeat(k), self.repeat(v)))
        scores = self.scores(q, k, cast=False)
        p = tape.new(scores.numel, 4, scores.grad)
        self._softmax(p)
        if p.grad:
            tape.save(p)
            tape.passes(2 * p.nbytes)
        out = self.mix(tape.dropout(p, self.model.dropout), v, cast=False)
        return tape.cast(out, width)

    def _softmax(self, p: Tensor) -> None:
        self.tape.streams(2 * p.nbytes, 3 * p.nbytes, launches=(1, int(p.grad)), kind="exp")

    def scores(self, q: Tensor, k: Tensor, *, cast: bool = True) -> Tensor:
        """q k^T, [B, H, queries, keys]."""
        q = self.tape.like(self.tape.operand(q) if cast else q)  # a contiguous copy, as k becomes one in `product`
        return self.product(q, k, self.batch * self.heads * self.queries * self.keys, self.flops(q), cast)

    def mix(self, p: Tensor, v: Tensor, *, cast: bool = True) -> Tensor:
        """p v, [B, H, queries, head_dim]."""
        p = self.tape.operand(p) if cast else p
        numel = v.numel // self.keys * self.queries
        return self.product(p, v, numel, 2.0 * numel * self.keys, cast)

    def product(self, x: Tensor, y: Tensor, numel: int, flops: float, cast: bool) -> Tensor:
        tape = self.tape
        y = tape.like(tape.operand(y) if cast else y)
        if y.grad:
            tape.save(x)
        if x.grad:
            tape.save(y)
        tape.count(flops, x.grad, y.grad)
        tape.uses(x, y)
        nbytes = (x.numel + y.numel + numel) * x.width
        tape.multiplies("batched", flops, nbytes, x.width, x.grad, y.grad, matrices=self.batch * self.heads)
        return tape.new(numel, x.width, x.grad or y.grad)

    def flops(self, q: Tensor) -> float:
        """2 B queries keys D: one of the two products."""
        return 2.0 * q.numel * self.keys

    def repeat(self, x: Tensor) -> Tensor:
        """Grouped heads, each copied for the query heads that share it; as they are when there are as many."""
        if self.groups == 1:
            return x
        self.tape.streams((1 + self.groups) * x.nbytes, (1 + self.groups) * x.nbytes, launches=(1, int(x.grad)))
        return self.tape.new(x.numel * self.groups, x.width, x.grad)
