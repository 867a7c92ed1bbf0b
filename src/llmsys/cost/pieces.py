"""`llmsys.lorafa.pieces` on the tape: what its functions keep, compute again and multiply.

A piece keeps its inputs, where its backward pass reads them, and its extras; a chain the inputs of its first piece and
the extras of all. Which pieces a family's block is made of, and where a policy cuts them, stands in `families`. T rows,
N inputs, M outputs of a layer, R low-rank width.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Protocol

from llmsys.cost.tape import Tape, Tensor

if TYPE_CHECKING:
    from llmsys.cost.walk import Walk


class Piece(Protocol):
    """A function with one hand-derived backward pass. `play` comes first: the rest is about what it played."""

    trained: bool

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
        """FLOPs of the outputs once more."""
        ...

    def backward(self, wanted: bool) -> float:
        """FLOPs, without what is computed again."""
        ...

    def passing(self, wanted: bool) -> int:
        """The most bytes that the backward pass makes at once, the gradients that it returns among them."""
        ...


def run(tape: Tape, piece: Piece, *inputs: Tensor) -> tuple[Tensor, ...]:
    """Plays `piece` as one node of autograd's graph."""
    outputs, extras = piece.play(*inputs)
    wanted = any(x.grad for x in inputs)
    tape.forward[tape.part] += piece.forward()
    if not wanted and not piece.trained:
        return outputs
    kept = [*(inputs if piece.reads_inputs(wanted) else ()), *extras]
    if kept:
        tape.save(*kept)
    tape.backward[tape.part] += piece.backward(wanted)
    tape.passes(sum(x.nbytes for x in outputs), piece.passing(wanted))
    if isinstance(piece, Chain):
        tape.again[tape.part] += piece.recomputed(wanted)
    return tuple(x._replace(grad=True) for x in outputs)


class Norm:
    """RMSNorm or LayerNorm, its weights frozen: keeps x, and one or two fp32 numbers a row."""

    trained = False

    def __init__(self, walk: Walk, kind: str = "rms") -> None:
        self.walk, self.kind = walk, kind

    def play(self, *inputs: Tensor) -> tuple[tuple[Tensor, ...], list[Tensor]]:
        (x,), tape = inputs, self.walk.tape
        rows = x.numel // self.walk.transformer.hidden_size
        if self.kind == "rms":
            self.nbytes = 3 * x.numel * 4
            return (tape.new(x.numel, max(x.width, self.walk.width), False),), [tape.new(rows, 4, True)]
        y = tape.new(x.numel, 4 if tape.autocast else x.width, False)
        width = 4 if tape.cuda else y.width
        self.nbytes = x.numel * (2 * y.width if tape.autocast else x.width)
        return (y,), [tape.new(rows, width, True), tape.new(rows, width, True)]

    def reads_inputs(self, wanted: bool) -> bool:
        return wanted

    def forward(self) -> float:
        return 0.0

    def again(self) -> float:
        return 0.0

    def backward(self, wanted: bool) -> float:
        return 0.0

    def passing(self, wanted: bool) -> int:
        return self.nbytes * wanted


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


class Activation:
    """f(g), or f(g) u: keeps g and u."""

    trained = False

    def __init__(self, walk: Walk) -> None:
        self.walk = walk

    def play(self, *inputs: Tensor) -> tuple[tuple[Tensor, ...], list[Tensor]]:
        self.inputs = inputs
        return (self.walk.tape.new(inputs[0].numel, inputs[0].width, False),), []

    def reads_inputs(self, wanted: bool) -> bool:
        return wanted

    def forward(self) -> float:
        return 0.0

    def again(self) -> float:
        return 0.0

    def backward(self, wanted: bool) -> float:
        return 0.0

    def passing(self, wanted: bool) -> int:
        """dg; of a gated one also du, and f(g) beside them."""
        return wanted * self.inputs[0].numel * self.inputs[0].width * (1 if len(self.inputs) == 1 else 3)


class Dropout:
    """A mask drawn again from its seed: keeps nothing."""

    trained = False

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

    def forward(self) -> float:
        return 0.0

    def again(self) -> float:
        return 0.0

    def backward(self, wanted: bool) -> float:
        return 0.0

    def passing(self, wanted: bool) -> int:
        return self.nbytes * wanted


class Core:
    """Attention between its projections, computed again with autograd in the backward pass: keeps nothing."""

    trained = False

    def __init__(self, walk: Walk, core: Callable[..., Tensor]) -> None:
        self.walk, self.core = walk, core

    def play(self, *inputs: Tensor) -> tuple[tuple[Tensor, ...], list[Tensor]]:
        tape = self.walk.tape
        own = [x._replace(grad=True) for x in inputs]
        self.played = tape.aside(lambda: self.core(*own))
        self.nbytes = self.played.passing + sum(x.nbytes for x in inputs)
        return (self.played.out._replace(grad=False),), []

    def reads_inputs(self, wanted: bool) -> bool:
        return wanted

    def forward(self) -> float:
        return self.played.forward

    def again(self) -> float:
        return self.played.forward

    def backward(self, wanted: bool) -> float:
        """Its derivative, for which it is played once more."""
        return wanted * self.played.backward

    def passing(self, wanted: bool) -> int:
        return wanted * self.nbytes


class Chain:
    """Pieces one after another: keeps the inputs of the first, if any piece reads its own, and all extras."""

    def __init__(self, *pieces: Piece) -> None:
        self.pieces = pieces
        self.trained = any(piece.trained for piece in pieces)

    def play(self, *inputs: Tensor) -> tuple[tuple[Tensor, ...], list[Tensor]]:
        extras: list[Tensor] = []
        self.between: list[tuple[Tensor, ...]] = []
        for piece in self.pieces:
            self.between.append(inputs)
            inputs, more = piece.play(*inputs)
            extras += more
        self.outputs = inputs
        return inputs, extras

    def _wanted(self, i: int, wanted: bool) -> bool:
        return wanted or any(piece.trained for piece in self.pieces[:i])

    def _readers(self, wanted: bool) -> list[int]:
        """The pieces that read their inputs."""
        return [i for i, piece in enumerate(self.pieces) if piece.reads_inputs(self._wanted(i, wanted))]

    def reads_inputs(self, wanted: bool) -> bool:
        return bool(self._readers(wanted))

    def forward(self) -> float:
        return sum(piece.forward() for piece in self.pieces)

    def again(self) -> float:
        return sum(piece.again() for piece in self.pieces)

    def backward(self, wanted: bool) -> float:
        return sum(piece.backward(self._wanted(i, wanted)) for i, piece in enumerate(self.pieces))

    def recomputed(self, wanted: bool) -> float:
        """FLOPs of what the backward pass computes again: up to the last piece that reads its inputs, and attention's
        core once more, for its derivative."""
        last = max(self._readers(wanted), default=0)
        cores = sum(p.again() for i, p in enumerate(self.pieces) if isinstance(p, Core) and self._wanted(i, wanted))
        return sum(piece.again() for piece in self.pieces[:last]) + cores

    def passing(self, wanted: bool) -> int:
        """The worst moment: what was computed again and is still to be read, the gradient that comes in, and what the
        piece in hand makes of it."""
        readers = self._readers(wanted)
        worst, coming = 0, 0
        for i in reversed(range(len(self.pieces))):
            again = sum(x.nbytes for j in readers if 0 < j <= i for x in self.between[j])
            worst = max(worst, again + coming + self.pieces[i].passing(self._wanted(i, wanted)))
            coming = sum(x.nbytes for x in self.between[i])
        return worst
