"""Pieces that put other pieces side by side: a residual, a branch, two inputs."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from llmsys.lorafa.pieces.piece import Composed, Extra, Piece, run


class Residual:
    """y = x + p(x). Backward: dx = dy + what p's backward pass makes of dy. Keeps: what p keeps.

    Behind a norm whose output goes both ways (BERT's), Chain(norm, Residual(p)) keeps the norm's input alone.
    """

    def __init__(self, piece: Piece) -> None:
        self.piece = piece

    def trained(self) -> list[Tensor]:
        return self.piece.trained()

    def forward(self, *inputs: Tensor) -> tuple[tuple[Tensor, ...], list[Extra]]:
        (y,), extras = self.piece.forward(*inputs)
        self.dtype = y.dtype  # under autocast narrower than the sum's
        return (inputs[0] + y,), extras

    def again(self, inputs: Sequence[Tensor], extras: Sequence[Extra]) -> tuple[Tensor, ...]:
        return (inputs[0] + self.piece.again(inputs, extras)[0],)

    def reads_inputs(self, wanted: bool) -> bool:
        return self.piece.reads_inputs(wanted)

    def backward(
        self, inputs: Sequence[Tensor] | None, extras: Sequence[Extra], grads: Sequence[Tensor], wanted: bool
    ) -> tuple[tuple[Tensor | None, ...], list[Tensor | None]]:
        (dx,), trained = self.piece.backward(inputs, extras, [grads[0].to(self.dtype)], wanted)
        return (dx + grads[0] if wanted and dx is not None else None,), trained


class Branch:
    """x -> (x, p(x)): the residual's two ways, to be joined later. Backward: dx is the sum of both ways'. Keeps: what
    p keeps."""

    def __init__(self, piece: Piece) -> None:
        self.piece = piece

    def trained(self) -> list[Tensor]:
        return self.piece.trained()

    def forward(self, *inputs: Tensor) -> tuple[tuple[Tensor, ...], list[Extra]]:
        outputs, extras = self.piece.forward(*inputs)
        return (*inputs, *outputs), extras

    def again(self, inputs: Sequence[Tensor], extras: Sequence[Extra]) -> tuple[Tensor, ...]:
        return (*inputs, *self.piece.again(inputs, extras))

    def reads_inputs(self, wanted: bool) -> bool:
        return self.piece.reads_inputs(wanted)

    def backward(
        self, inputs: Sequence[Tensor] | None, extras: Sequence[Extra], grads: Sequence[Tensor], wanted: bool
    ) -> tuple[tuple[Tensor | None, ...], list[Tensor | None]]:
        straight, *onward = grads
        (dx,), trained = self.piece.backward(inputs, extras, onward, wanted)
        return (dx + straight if wanted and dx is not None else None,), trained


class Beside(Composed):
    """(x_1, x_2, ...) -> the outputs of p_1(x_1), then those of p_2(x_2): cross-attention's query from the decoder, key
    and value from the encoder. Backward: each piece's own. Keeps: what the pieces keep, and all inputs if one reads its
    own (the encoder's output is one tensor for all layers)."""

    def forward(self, *inputs: Tensor) -> tuple[tuple[Tensor, ...], list[Extra]]:
        outputs: list[Tensor] = []
        extras: list[Extra] = []
        self._sizes = []
        for piece, x in zip(self.pieces, inputs, strict=True):
            made, more = piece.forward(x)
            self._sizes.append((len(made), len(more)))
            outputs += made
            extras += more
        return tuple(outputs), extras

    def again(self, inputs: Sequence[Tensor], extras: Sequence[Extra]) -> tuple[Tensor, ...]:
        left = list(extras)
        outputs: list[Tensor] = []
        for piece, x, (_, count) in zip(self.pieces, inputs, self._sizes, strict=True):
            own, left = left[:count], left[count:]
            outputs += piece.again([x], own)
        return tuple(outputs)

    def reads_inputs(self, wanted: bool) -> bool:
        return any(piece.reads_inputs(wanted) for piece in self.pieces)

    def backward(
        self, inputs: Sequence[Tensor] | None, extras: Sequence[Extra], grads: Sequence[Tensor], wanted: bool
    ) -> tuple[tuple[Tensor | None, ...], list[Tensor | None]]:
        found: list[Tensor | None] = []
        trained: list[Tensor | None] = []
        left, arrived = list(extras), list(grads)
        for i, (piece, (made, count)) in enumerate(zip(self.pieces, self._sizes, strict=True)):
            own, left = left[:count], left[count:]
            mine, arrived = arrived[:made], arrived[made:]
            (dx,), more = piece.backward(None if inputs is None else [inputs[i]], own, mine, wanted)
            found.append(dx)
            trained += more
        return tuple(found), trained


def run_apart(piece: Piece, *inputs: Tensor) -> tuple[Tensor, ...]:
    """The outputs of `piece`; of pieces side by side each as a chain of its own, so that one's input is not kept for
    the other's sake."""
    if isinstance(piece, Beside):
        return tuple(y for part, x in zip(piece.pieces, inputs, strict=True) for y in run_apart(part, x))
    outputs = run(piece, *inputs)
    return (outputs,) if isinstance(outputs, Tensor) else tuple(outputs)
