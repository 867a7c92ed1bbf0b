"""What a rank computes by itself: products, attention, softmax and norms, forward and backward, each alone.

Bytes are those that an operator has to read and write at least: a softmax x and y, its derivative y, dy and dx. What is
made of several operators (an eager RMSNorm) moves more, which shows as a lower rate. Operands are random numbers: of
zeros a GPU draws less power, and runs faster. Shapes as in `shapes`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from llmsys import schema
from llmsys.bench.ops import shapes
from llmsys.bench.ops.clock import Clock, Timed, copies
from llmsys.models.build import DTYPES

Make = Callable[[], Callable[[], object]]
"""Makes a set of operands, and gives what works on it."""


class Operators:
    """Of `model` as `train` trains it. `flops`: the device's peak in `train.precision`; `bytes_per_s`: of its memory,
    where it is known."""

    def __init__(
        self, model: schema.Transformer, train: schema.Train, clock: Clock, flops: float, bytes_per_s: float | None
    ) -> None:
        self.model, self.train, self.clock = model, train, clock
        self.flops, self.bytes_per_s = flops, bytes_per_s
        self.device, self.precision = clock.device, train.precision

    def run(self, operators: list[str]) -> Iterator[Timed]:
        """Every operator of the groups that are named in `operators`, one after another."""
        for name in operators:
            yield from getattr(self, f"_{name}", lambda: ())()

    def _timed(self, key: str, make: Make, held: int, **what: Any) -> Timed:
        """`held`: bytes of a set of operands."""
        acts = [make() for _ in range(copies(held))]
        return Timed(key=key, seconds=self.clock.samples(acts), **what)

    def _random(self, *shape: int, dtype: str = "", grad: bool = False) -> Tensor:
        made = torch.randn(shape, dtype=DTYPES[dtype or self.precision], device=self.device)
        return made.requires_grad_(grad)

    def _gemm(self) -> Iterator[Timed]:
        width = DTYPES[self.precision].itemsize

        def make(gemm: shapes.Gemm) -> Callable[[], object]:
            m, n, k = gemm.m, gemm.n, gemm.k
            # as they lie in memory: x and W [k last]; dy and W; dy and x, of which the first is read transposed
            a = self._random(k, m).T if gemm.op == "gemm_tn" else self._random(m, k)
            b = self._random(n, k).T if gemm.op == "gemm" else self._random(k, n)
            return partial(torch.matmul, a, b, out=self._random(m, n))

        for gemm in shapes.gemms(self.model, self.train):
            nbytes = width * (gemm.m * gemm.k + gemm.k * gemm.n + gemm.m * gemm.n)
            key = f"{gemm.key}/{self.precision}"
            yield self._timed(key, partial(make, gemm), nbytes, flops=gemm.flops, peak=self.flops, rows=gemm.rows)

    def _attention(self) -> Iterator[Timed]:
        """torch's fused kernel, whichever it chooses, and the two batched products of eager attention. The whole square
        is counted, also of a causal kernel; the backward pass as five products."""
        width = DTYPES[self.precision].itemsize
        for each in shapes.attentions(self.model, self.train):
            b, h, queries, keys, w = each.batch, each.heads, each.queries, each.keys, each.width
            nbytes = width * b * (2 * h * queries + 2 * each.kv_heads * keys) * w

            def make(each: shapes.Attention = each) -> Callable[[], Tensor]:
                q = self._random(each.batch, each.heads, each.queries, each.width, grad=True)
                k, v = (
                    self._random(each.batch, each.kv_heads, each.keys, each.width, grad=True).repeat_interleave(
                        each.heads // each.kv_heads, 1
                    )
                    for _ in "kv"
                )
                k, v = (x.detach().requires_grad_() for x in (k, v))
                return partial(F.scaled_dot_product_attention, q, k, v, is_causal=each.causal)

            known = {"peak": self.flops, "rows": ("attention",)}
            key = f"{each.shape}/{self.precision}"
            yield self._timed(f"attention/{key}", make, nbytes, flops=2 * each.product_flops, **known)
            yield self._timed(
                f"attention_backward/{key}",
                partial(_derivative, make),
                3 * nbytes,
                flops=5 * each.product_flops,
                **known,
            )
            for row, m, n, k in (("scores", queries, keys, w), ("context", queries, w, keys)):
                operands = width * b * h * (m * k + k * n + m * n)

                def product(m: int = m, n: int = n, k: int = k, batch: int = b * h) -> Callable[[], object]:
                    x, y = self._random(batch, m, k), self._random(batch, k, n)
                    return partial(torch.bmm, x, y, out=self._random(batch, m, n))

                key = f"bmm/{b * h}x{m}x{n}x{k}/{self.precision}"
                yield self._timed(key, product, operands, flops=each.product_flops, peak=self.flops, rows=(row,))

    def _softmax(self) -> Iterator[Timed]:
        for rows, columns, dtype in shapes.softmaxes(self.model, self.train):

            def make(rows: int = rows, columns: int = columns, dtype: str = dtype) -> Callable[[], Tensor]:
                return partial(F.softmax, self._random(rows, columns, dtype=dtype, grad=True), dim=-1)

            row = "loss" if columns == self.model.vocab_size else "softmax"
            yield from self._both("softmax", f"{rows}x{columns}/{dtype}", make, rows * columns, dtype, row)

    def _norm(self) -> Iterator[Timed]:
        """The family's own module, trained, in the dtype of the model's weights."""
        kind, rows, columns = shapes.norms(self.model, self.train)
        dtype = self.model.dtype

        def make() -> Callable[[], Tensor]:
            norm = _norm(self.model.family, columns, self.model.norm_eps).to(self.device, DTYPES[dtype])
            return partial(norm, self._random(rows, columns, dtype=dtype, grad=True))

        yield from self._both(kind, f"{rows}x{columns}/{dtype}", make, rows * columns, dtype, "norm")

    def _both(
        self, name: str, shape: str, make: Callable[[], Callable[[], Tensor]], numel: int, dtype: str, row: str
    ) -> Iterator[Timed]:
        """Forward, which reads and writes a tensor, and backward, which reads two and writes one."""
        nbytes = numel * DTYPES[dtype].itemsize
        known = {"peak": self.bytes_per_s, "rows": (row,)}
        yield self._timed(f"{name}/{shape}", make, 2 * nbytes, nbytes=2 * nbytes, **known)
        yield self._timed(
            f"{name}_backward/{shape}", partial(_derivative, make), 3 * nbytes, nbytes=3 * nbytes, **known
        )


def _derivative(make: Callable[[], Callable[[], Tensor]]) -> Callable[[], object]:
    """The backward pass of what `make` makes, whose forward pass runs once."""
    act = make()
    out = act()
    inputs = [node.variable for node in _leaves(out)]
    return partial(torch.autograd.grad, out, inputs, torch.randn_like(out), retain_graph=True)


def _leaves(out: Tensor) -> list[Any]:
    """The ends of the graph, where gradients would be accumulated."""
    found, todo = {}, [out.grad_fn]
    while todo:
        node = todo.pop()
        if node is None or node in found:
            continue
        found[node] = hasattr(node, "variable")
        todo += [each for each, _ in node.next_functions]
    return [node for node, leaf in found.items() if leaf]


def _norm(family: str, width: int, eps: float) -> nn.Module:
    if family == "llama":
        from transformers.models.llama.modeling_llama import LlamaRMSNorm

        return LlamaRMSNorm(width, eps)
    if family == "t5":
        from transformers.models.t5.modeling_t5 import T5LayerNorm

        return T5LayerNorm(width, eps)
    return nn.LayerNorm(width, eps)
