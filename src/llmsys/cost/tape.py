"""The rules by which autograd keeps tensors for the backward pass, without tensors.

A forward pass over torch's autograd saves, operator by operator, what that operator's derivative reads, and only if a
gradient is wanted:

    y = x W^T        dW = dy^T x, dx = dy W      saves x if W is trained, W if x needs a gradient
    convolution      as a product                the same
    s * u            ds = dy u,   du = dy s      saves u if s needs one, s if u does
    silu, gelu       dx = dy f'(x)               saves x
    relu, tanh       dx = dy g(y)                saves its output y
    softmax          dx = y (dy - sum(dy y))     saves its output y
    RMSNorm (HF)     fp32 copy of x, 1/rms       saves both; with a trained weight also the normalised x
    LayerNorm        x, mean, 1/std              saves all three
    BatchNorm        x, mean, 1/std by channel   saves all three
    max pooling      dx goes to the largest      saves x and the int64 places
    dropout          dx = dy mask                saves the mask: 1 byte an element on CUDA, x's own width on a CPU
    fused attention  recomputes the scores       saves q, k, v, the output and one fp32 log-sum-exp a row
    eager attention                              saves q, k, v and the L x L probabilities

A tensor saved twice costs once (the three projections of attention read one x), a cast copy is another tensor, a view
costs what it is a view of, and parameters cost nothing, being counted as weights. `Tape` plays these rules with tensors
that have a size, a width in bytes, a flag `grad` and a storage number, which is what makes one description of a block
serve every method: freezing a weight is one flag, and what is no longer saved follows. The same walk counts
multiplications: 2 FLOPs for each multiply-add of a matrix product, forward; in the backward pass once more for each
operand that needs a gradient.

Autocast (fp32 weights, bf16 products): each product casts its fp32 operands, so what is saved is a bf16 copy for each
product, and a bf16 copy of the weight wherever x needs a gradient.

ZeRO-3 replaces `torch.nn.functional.linear` by a function of its own that keeps x, uncast, wherever anything of the
product needs a gradient: a frozen layer's input too.

Recomputation: of a checkpointed block only its inputs are held; what it saves comes back for its own backward pass.
"""

from __future__ import annotations

from llmsys.cost import work
from llmsys.cost.notes import Notes, Tensor
from llmsys.cost.work import Both


class Tape(Notes):
    """Operators: what each makes, keeps, multiplies and moves."""

    def like(self, x: Tensor, *others: Tensor) -> Tensor:
        """A sum, or a copy: as wide as its widest operand."""
        self.uses(x, *others)
        y = self._like(x, *others)
        self.streams(sum(t.width for t in (x, *others, y)) * x.numel, 0, launches=(1, 0))
        return y

    def _like(self, x: Tensor, *others: Tensor) -> Tensor:
        return self.new(x.numel, max(t.width for t in (x, *others)), any(t.grad for t in (x, *others)))

    def cast(self, x: Tensor, width: int) -> Tensor:
        """`x` at another width: a copy, or x itself where it has that width."""
        if x.width == width:
            return x
        self.uses(x)
        self.streams((x.width + width) * x.numel, (x.width + width) * x.numel, launches=(1, int(x.grad)))
        return self.new(x.numel, width, x.grad)

    def operand(self, x: Tensor) -> Tensor:
        """`x` as a matrix product reads it: under autocast in bf16."""
        return self.cast(x, 2) if self.autocast else x

    def linear(self, x: Tensor, n_in: int, n_out: int, width: int, trained: bool) -> Tensor:
        """x [T, n_in] times a weight of `width` bytes an element -> [T, n_out], by `torch.nn.functional.linear`."""
        rows = x.numel // n_in
        if self.zero_3 and (trained or x.grad):
            self.save(x)
            self._matmul(self.operand(x), n_in * n_out, rows * n_out, 2.0 * rows * n_in * n_out, width, trained)
            self.count(2.0 * rows * n_in * n_out, trained, x.grad)
            self.read[self.part] += n_in * n_out * width * trained
            return self.new(rows * n_out, 2 if self.autocast else x.width, True)
        return self.product(x, n_in * n_out, rows * n_out, 2.0 * rows * n_in * n_out, width, trained)

    def product(self, x: Tensor, weights: int, numel: int, flops: float, width: int, trained: bool) -> Tensor:
        """A linear map by a parameter of `weights` elements, `width` bytes each -> `numel` elements."""
        x = self.operand(x)
        if trained:
            self.save(x)
        if x.grad:
            self.touch()
            if self.autocast and width == 4:
                self.save(self.new(weights, 2, False))
        self._matmul(x, weights, numel, flops, width, trained)
        self.count(flops, trained, x.grad)
        y = self._made(numel, x, trained)
        self.read[self.part] += weights * width * trained
        return y

    def _matmul(self, x: Tensor, weights: int, numel: int, flops: float, width: int, trained: bool) -> None:
        """As operators; under autocast with the casts of the weight and of its gradient."""
        self.uses(x)
        if self.autocast and width == 4:
            self.streams(6.0 * weights, 6.0 * weights, launches=(1, int(trained)))
        self.multiplies("product", flops, (x.numel + weights + numel) * x.width, x.width, trained, x.grad)

    def _made(self, numel: int, x: Tensor, trained: bool) -> Tensor:
        """A product: in the backward pass its gradient, and that of `x`."""
        y = self.new(numel, x.width, x.grad or trained)
        self.passes(self.coming(y.nbytes * y.grad), x.nbytes * x.grad)
        return y

    def coming(self, nbytes: int) -> int:
        """Bytes of the gradient of what a product or a chain has made, beside what goes past the block's branches: as
        large as that it is that, and not another tensor."""
        return 0 if nbytes == self.past[self.part] else nbytes

    def convolution(self, x: Tensor, weights: int, numel: int, flops: float, width: int, trained: bool) -> Tensor:
        """As `product`, but it keeps both operands wherever it keeps one."""
        x = self.operand(x)
        if trained or x.grad:
            self.save(x)
            if self.autocast and width == 4:
                self.save(self.new(weights, 2, False))
        self._matmul(x, weights, numel, flops, width, trained)
        self.count(flops, trained, x.grad)
        y = self._made(numel, x, trained)
        self.read[self.part] += weights * width * trained
        return y

    def multiply(self, x: Tensor, y: Tensor) -> Tensor:
        """Elementwise product."""
        if y.grad:
            self.save(x)
        if x.grad:
            self.save(y)
        self.uses(x, y)
        product = self._like(x, y)
        each = x.nbytes + y.nbytes + product.nbytes
        self.streams(each, each * (x.grad + y.grad), launches=(1, x.grad + y.grad))
        self.passes(product.nbytes * product.grad, x.nbytes * x.grad, y.nbytes * y.grad)
        return product

    def from_input(self, x: Tensor) -> Tensor:
        """An activation whose derivative reads its input (silu, gelu)."""
        if x.grad:
            self.save(x)
            self.passes(2 * x.nbytes)
        return self._exponential(x)

    def _exponential(self, x: Tensor) -> Tensor:
        self.uses(x)
        self.streams(2 * x.nbytes, 3 * x.nbytes, launches=(1, int(x.grad)), kind="exp")
        return self._like(x)

    def from_output(self, x: Tensor) -> Tensor:
        """An activation whose derivative reads its output (relu, tanh)."""
        y = self._exponential(x)
        if x.grad:
            self.save(y)
            self.passes(2 * x.nbytes)
        return y

    def dropout(self, x: Tensor, p: float) -> Tensor:
        """x times a random mask; nothing at all when p is 0."""
        if p == 0:
            return x
        if x.grad:
            self.save(self.new(x.numel, 1 if self.cuda else x.width, False), origin="dropout")
            self.passes(2 * x.nbytes)
        return self._exponential(x)

    def rms_norm(self, x: Tensor, rows: int, trained: bool) -> Tensor:
        """transformers' LlamaRMSNorm: x in fp32 times 1/rms, cast back, times the weight."""
        wide = x if x.width == 4 else self.new(x.numel, 4, x.grad)
        self.uses(x)
        self.both(work.rms_norm(x.numel, x.width, trained), x.grad or trained)
        if x.grad:
            self.save(wide, self.new(rows, 4, True), origin="norm")
            self.passes(5 * 4 * x.numel)
        normed = self.new(x.numel, x.width, x.grad)
        if trained:
            self.save(normed, origin="norm")
        return self.new(x.numel, x.width, x.grad or trained)

    def layer_norm(self, x: Tensor, rows: int, trained: bool) -> Tensor:
        """torch's layer_norm, which autocast runs in fp32."""
        x = self.cast(x, 4) if self.autocast else x
        self._normed(x, trained)
        if x.grad or trained:
            width = 4 if self.cuda else x.width
            self.save(x, self.new(rows, width, True), self.new(rows, width, True), origin="norm")
            self.passes(2 * x.nbytes)
        return self.new(x.numel, x.width, x.grad or trained)

    def batch_norm(self, x: Tensor, channels: int, trained: bool) -> Tensor:
        """torch's batch_norm in training, with fp32 statistics."""
        self._normed(x, trained)
        if x.grad or trained:
            self.save(x, self.new(channels, 4, True), self.new(channels, 4, True))
        return self.new(x.numel, x.width, x.grad or trained)

    def _normed(self, x: Tensor, trained: bool) -> None:
        """A norm that is one operator: it reads its input twice."""
        self.uses(x)
        self.both(Both(3 * x.nbytes, 1, 5 * x.nbytes, 1), x.grad or trained)

    def rotate(self, x: Tensor, cos: Tensor) -> Tensor:
        """x cos + rotated(x) sin, written in Python."""
        self.uses(x)
        self.both(work.rotation(x.numel, x.width), x.grad)
        return self._like(x, cos)
