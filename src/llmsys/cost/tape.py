"""The rules by which autograd keeps tensors for the backward pass, without tensors.

A forward pass over torch's autograd saves, operator by operator, what that operator's derivative reads, and only if a
gradient is wanted:

    y = x W^T        dW = dy^T x, dx = dy W      saves x if W is trained, W if x needs a gradient
    s * u            ds = dy u,   du = dy s      saves u if s needs one, s if u does
    silu, gelu       dx = dy f'(x)               saves x
    softmax          dx = y (dy - sum(dy y))     saves its output y
    RMSNorm (HF)     fp32 copy of x, 1/rms       saves both; with a trained weight also the normalised x
    LayerNorm        x, mean, 1/std              saves all three
    dropout          dx = dy mask                saves the mask: 1 byte an element on CUDA, x's own width on a CPU
    fused attention  recomputes the scores       saves q, k, v, the output and one fp32 log-sum-exp a row
    eager attention                              saves q, k, v and the L x L probabilities

A tensor saved twice costs once (the three projections of attention read one x), a cast copy is another tensor, and
parameters cost nothing, being counted as weights. `Tape` plays these rules with tensors that have a size, a width in
bytes, a flag `grad` and a storage number, which is what makes one description of a block serve every method: freezing
a weight is one flag, and what is no longer saved follows. The same walk counts multiplications: 2 FLOPs for each
multiply-add of a matrix product, forward; in the backward pass once more for each operand that needs a gradient.

Autocast (fp32 weights, bf16 products): each product casts its fp32 operands, so what is saved is a bf16 copy for each
product, and a bf16 copy of the weight wherever x needs a gradient.
"""

from __future__ import annotations

from collections import defaultdict
from typing import NamedTuple


class Tensor(NamedTuple):
    """What the accounting needs of a tensor; `width` is bytes an element."""

    numel: int
    width: int
    grad: bool
    storage: int


class Tape:
    """Saved bytes and FLOPs by part of the model (`part` is set by the walker)."""

    def __init__(self, *, autocast: bool, cuda: bool) -> None:
        self.autocast = autocast
        self.cuda = cuda
        self.part = ""
        self.saved: dict[str, int] = defaultdict(int)
        self.forward: dict[str, float] = defaultdict(float)
        self.backward: dict[str, float] = defaultdict(float)
        self.until_last_save: dict[str, float] = defaultdict(float)
        self._seen: set[int] = set()
        self._storages = 0

    def new(self, numel: int, width: int, grad: bool) -> Tensor:
        """A tensor in memory of its own."""
        self._storages += 1
        return Tensor(numel, width, grad, self._storages)

    def save(self, tensor: Tensor) -> None:
        """Keeps `tensor` for the backward pass; free where its storage is kept already."""
        self.touch()
        if tensor.storage not in self._seen:
            self._seen.add(tensor.storage)
            self.saved[self.part] += tensor.numel * tensor.width

    def touch(self) -> None:
        """Notes that something is saved here: a checkpointed block is computed again only up to its last save."""
        self.until_last_save[self.part] = self.forward[self.part]

    def cast(self, x: Tensor, width: int) -> Tensor:
        """`x` at another width: a copy, or x itself where it has that width."""
        return x if x.width == width else self.new(x.numel, width, x.grad)

    def operand(self, x: Tensor) -> Tensor:
        """`x` as a matrix product reads it: under autocast in bf16."""
        return self.cast(x, 2) if self.autocast else x

    def count(self, flops: float, *grads: bool) -> None:
        """A product of `flops`, and its derivative by each operand that needs one."""
        self.forward[self.part] += flops
        self.backward[self.part] += flops * sum(grads)

    def linear(self, x: Tensor, n_in: int, n_out: int, width: int, trained: bool) -> Tensor:
        """x [T, n_in] times a weight of `width` bytes an element -> [T, n_out]."""
        x = self.operand(x)
        if trained:
            self.save(x)
        if x.grad:
            self.touch()
            if self.autocast and width == 4:
                self.save(self.new(n_in * n_out, 2, False))
        rows = x.numel // n_in
        self.count(2.0 * rows * n_in * n_out, trained, x.grad)
        return self.new(rows * n_out, x.width, x.grad or trained)

    def add(self, x: Tensor, y: Tensor) -> Tensor:
        """Saves nothing; the wider of the two decides the result's width."""
        return self.new(x.numel, max(x.width, y.width), x.grad or y.grad)

    def multiply(self, x: Tensor, y: Tensor) -> Tensor:
        """Elementwise product."""
        if y.grad:
            self.save(x)
        if x.grad:
            self.save(y)
        return self.new(x.numel, max(x.width, y.width), x.grad or y.grad)

    def pointwise(self, x: Tensor) -> Tensor:
        """An activation (silu, gelu): its derivative reads its input."""
        if x.grad:
            self.save(x)
        return self.new(x.numel, x.width, x.grad)

    def dropout(self, x: Tensor, p: float) -> Tensor:
        """x times a random mask; nothing at all when p is 0."""
        if p == 0:
            return x
        if x.grad:
            self.save(self.new(x.numel, 1 if self.cuda else x.width, False))
        return self.new(x.numel, x.width, x.grad)

    def rms_norm(self, x: Tensor, rows: int, trained: bool) -> Tensor:
        """transformers' LlamaRMSNorm: x in fp32 times 1/rms, cast back, times the weight."""
        wide = self.cast(x, 4)
        if x.grad:
            self.save(wide)
            self.save(self.new(rows, 4, True))
        normed = self.cast(self.new(x.numel, 4, x.grad), x.width)
        if trained:
            self.save(normed)
        return self.new(x.numel, x.width, x.grad or trained)

    def layer_norm(self, x: Tensor, rows: int, trained: bool) -> Tensor:
        """torch's layer_norm, which autocast runs in fp32."""
        x = self.cast(x, 4) if self.autocast else x
        if x.grad or trained:
            self.save(x)
            for _ in ("mean", "rstd"):
                self.save(self.new(rows, 4 if self.cuda else x.width, True))
        return self.new(x.numel, x.width, x.grad or trained)
