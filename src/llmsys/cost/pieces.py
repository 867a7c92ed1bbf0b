"""`llmsys.lorafa.pieces` on the tape: what its functions keep, compute again and multiply.

A piece keeps its inputs, where its backward pass reads them, and its extras. How pieces are joined stands in `chains`,
which of them a family's block is made of, and where a policy cuts, in `families`. T rows, N inputs, M outputs of a
layer, R low-rank width.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Protocol

from llmsys.cost import work
from llmsys.cost.notes import Tensor
from llmsys.cost.work import BACKWARD, FORWARD, Both, Op

if TYPE_CHECKING:
    from llmsys.cost.walk import Walk


class Piece(Protocol):
    """A function with one hand-derived backward pass. `play` comes first: the rest is about what it played."""

    @property
    def trained(self) -> bool:
        """Whether it has parameters that are trained."""
        ...

    @property
    def read(self) -> int:
        """Bytes of these parameters."""
        ...

    def play(self, *inputs: Tensor) -> tuple[tuple[Tensor, ...], list[Tensor]]:
        """(outputs, extras), neither noted anywhere."""
        ...

    def reads_inputs(self, wanted: bool) -> bool:
        """Whether the backward pass reads the inputs; `wanted`: whether it has to return their gradients."""
        ...

    def forward(self) -> float:
        """FLOPs."""
        ...

    def again(self) -> float:
        """FLOPs of the outputs once more, for a later piece that reads them."""
        ...

    def recomputed(self, wanted: bool) -> float:
        """FLOPs of what its own backward pass computes again."""
        ...

    def backward(self, wanted: bool) -> float:
        """FLOPs, without what is computed again."""
        ...

    def passing(self, wanted: bool) -> int:
        """The most bytes that the backward pass makes at once, the gradients that it returns among them."""
        ...

    def ops(self, passed: str, wanted: bool) -> list[Op]:
        """The operators of a pass; `AGAIN`: of what `again` counts."""
        ...


class Free:
    """What pieces without parameters and products have in common."""

    trained = False
    read = 0

    def reads_inputs(self, wanted: bool) -> bool:
        return wanted

    def forward(self) -> float:
        return 0.0

    def again(self) -> float:
        return 0.0

    def recomputed(self, wanted: bool) -> float:
        return 0.0

    def backward(self, wanted: bool) -> float:
        return 0.0

    def ops(self, passed: str, wanted: bool) -> list[Op]:
        return []


class Norm(Free):
    """RMSNorm or LayerNorm, its weights frozen: keeps x, and one or two fp32 numbers a row."""

    def __init__(self, walk: Walk, kind: str = "rms") -> None:
        self.walk, self.kind = walk, kind

    def play(self, *inputs: Tensor) -> tuple[tuple[Tensor, ...], list[Tensor]]:
        (x,), tape = inputs, self.walk.tape
        rows = x.numel // self.walk.transformer.hidden_size
        if self.kind == "rms":
            self.nbytes = 3 * x.numel * 4
            self.sizes = work.rms_norm(x.numel, x.width, False)
            return (tape.new(x.numel, max(x.width, self.walk.width), False),), [tape.new(rows, 4, True)]
        y = tape.new(x.numel, 4 if tape.autocast else x.width, False)
        width = 4 if tape.cuda else y.width
        self.nbytes = x.numel * (2 * y.width if tape.autocast else x.width)
        self.sizes = Both(2 * x.nbytes + y.nbytes, 1, 3 * y.nbytes + 2 * x.nbytes, 1)
        return (y,), [tape.new(rows, width, True), tape.new(rows, width, True)]

    def passing(self, wanted: bool) -> int:
        return self.nbytes * wanted

    def ops(self, passed: str, wanted: bool) -> list[Op]:
        if passed == BACKWARD:
            return [Op(passed, "stream", 0.0, self.sizes.backward, self.sizes.backward_launches)] * wanted
        return [Op(passed, "stream", 0.0, self.sizes.forward, self.sizes.forward_launches)]


class Linears:
    """Frozen layers of one input with adapters: keeps z [T, R] for each A, and x where an A is trained."""

    def __init__(self, walk: Walk, *names: str) -> None:
        self.walk = walk
        self.layers = [walk.layer(name) for name in names]
        self.own = [layer for layer in self.layers if layer.name in walk.owners]
        self.shrinks = list(dict.fromkeys(walk.owners[layer.name] for layer in self.own))
        method = walk.case.fused
        assert method is not None
        self.r, self.train_a = method.r, method.train_a and bool(self.own)
        self.correction, self.dropout = method.correction != "none", method.dropout > 0
        self.trained = bool(self.own)
        width = walk.case.adapter_width
        self.read = sum(self.r * layer.n_out * width for layer in self.own)
        self.read += self.train_a * len(self.shrinks) * self.r * self.layers[0].n_in * width

    def play(self, *inputs: Tensor) -> tuple[tuple[Tensor, ...], list[Tensor]]:
        tape, (x,) = self.walk.tape, inputs
        self.rows = x.numel // self.layers[0].n_in
        self.width = 2 if tape.autocast else x.width
        extras = [tape.new(self.rows * self.r, self.width, True) for _ in self.shrinks]
        return tuple(tape.new(self.rows * layer.n_out, self.width, False) for layer in self.layers), extras

    def reads_inputs(self, wanted: bool) -> bool:
        return self.train_a

    def _base(self) -> float:
        return sum(2.0 * self.rows * layer.n_in * layer.n_out for layer in self.layers)

    def _grow(self) -> float:
        """z B^T, for all layers."""
        return sum(2.0 * self.rows * self.r * layer.n_out for layer in self.own)

    def _shrink(self) -> float:
        """x A^T, for each A."""
        return 2.0 * self.rows * self.r * self.layers[0].n_in * len(self.shrinks)

    def forward(self) -> float:
        return self._base() + self._grow() + self._shrink()

    def again(self) -> float:
        return self._base() + self._grow()

    def recomputed(self, wanted: bool) -> float:
        return 0.0

    def backward(self, wanted: bool) -> float:
        """dx by W, by B and by A; dB; dA where it is trained."""
        corrections = sum(2.0 * layer.n_out * self.r**2 for layer in self.own) * self.correction
        narrow = self._grow() * (wanted or self.train_a)
        return (
            wanted * (self._base() + self._shrink())
            + self._grow()
            + narrow
            + self._shrink() * self.train_a
            + corrections
        )

    def passing(self, wanted: bool) -> int:
        x = self.rows * self.layers[0].n_in
        masked = x * (2 * self.width + 1) * (self.dropout and bool(self.own))
        return wanted * x * self.width + masked

    def ops(self, passed: str, wanted: bool) -> list[Op]:
        base = [(layer.n_in, layer.n_out) for layer in self.layers]
        grow = [(self.r, layer.n_out) for layer in self.own]
        shrink = [(self.layers[0].n_in, self.r)] * len(self.shrinks)
        found = [self._dequant(passed)] * (self.walk.model.quant != "none" and (wanted or passed != BACKWARD))
        if passed == BACKWARD:  # dx by W and by A, dz by B; dB, and dA
            narrow = grow * (wanted or self.train_a)
            products = (base + shrink) * wanted + narrow + grow + shrink * self.train_a
        else:
            products = base + grow + shrink * (passed == FORWARD)
        return found + [self._product(passed, *sizes) for sizes in products]

    def _product(self, passed: str, n_in: int, n_out: int) -> Op:
        nbytes = float(self.width * (self.rows * (n_in + n_out) + n_in * n_out))
        return Op(passed, "product", 2.0 * self.rows * n_in * n_out, nbytes, width=self.width)

    def _dequant(self, passed: str) -> Op:
        numels = [layer.n_in * layer.n_out for layer in self.layers]
        return Op(passed, "dequant", 0.0, sum(map(self.walk.widened, numels)), 2 * len(numels))


class Activation(Free):
    """f(g), or f(g) u: keeps g and u."""

    def __init__(self, walk: Walk) -> None:
        self.walk = walk

    def play(self, *inputs: Tensor) -> tuple[tuple[Tensor, ...], list[Tensor]]:
        self.inputs = inputs
        return (self.walk.tape.new(inputs[0].numel, inputs[0].width, False),), []

    def passing(self, wanted: bool) -> int:
        """dg; of a gated one also du, and f(g) beside them."""
        return wanted * self.inputs[0].numel * self.inputs[0].width * (1 if len(self.inputs) == 1 else 3)

    def ops(self, passed: str, wanted: bool) -> list[Op]:
        n, gated = self.inputs[0].nbytes, len(self.inputs) > 1
        if passed == BACKWARD:
            return [Op(passed, "exp", 0.0, 3.0 * n + 10 * n * gated, 1 + 4 * gated)] * wanted
        return [Op(passed, "exp", 0.0, 2.0 * n + 3 * n * gated, 1 + gated)]


class ReLU(Free):
    """max(x, 0): keeps a bit an element."""

    def __init__(self, walk: Walk) -> None:
        self.walk = walk

    def play(self, *inputs: Tensor) -> tuple[tuple[Tensor, ...], list[Tensor]]:
        (x,), tape = inputs, self.walk.tape
        self.nbytes = x.numel * (x.width + 1)
        return (tape.new(x.numel, x.width, False),), [tape.new(-(-x.numel // 8), 1, False)]

    def reads_inputs(self, wanted: bool) -> bool:
        return False

    def passing(self, wanted: bool) -> int:
        """dx, and the bits unpacked to bytes."""
        return self.nbytes * wanted


class Dropout(Free):
    """A mask drawn again from its seed: keeps nothing."""

    def __init__(self, walk: Walk) -> None:
        self.walk = walk

    def play(self, *inputs: Tensor) -> tuple[tuple[Tensor, ...], list[Tensor]]:
        (x,) = inputs
        self.nbytes = 0
        if not self.walk.model.dropout:
            return (x,), []
        self.nbytes = x.numel * (x.width + 1)
        return (self.walk.tape.new(x.numel, x.width, False),), []

    def reads_inputs(self, wanted: bool) -> bool:
        return False

    def passing(self, wanted: bool) -> int:
        return self.nbytes * wanted
