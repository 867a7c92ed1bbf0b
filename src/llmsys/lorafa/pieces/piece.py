"""Pieces: forward passes with a backward pass of their own, which can be chained.

Autograd keeps what each operator's derivative reads, operator by operator. A *piece* is a longer stretch with one
hand-derived backward pass. It keeps, of its forward pass, its inputs (where its backward pass reads them) and a few
small `extras` (an inverse norm, x A^T, a seed). A `Chain` of pieces keeps the inputs of its first piece and the extras
of all: what lies between is computed again in the backward pass, as far as some piece there reads it and no further.

    Norm -> Linears(gate, up)   |   Activation -> Linears(down)       two chains: gate and up are kept between them
    Norm -> Linears(gate, up)  ->  Activation -> Linears(down)        one chain: they are computed again

So how much is kept is the choice of where to cut, and the same few pieces make every policy. With A frozen, `Linears`
does not read its inputs in the backward pass: of the last layer of a chain nothing is ever computed again.
"""

from __future__ import annotations

import weakref
from collections.abc import Sequence
from typing import Any, Protocol

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from llmsys.uncompiled import uncompiled as uncompiled

Extra = Tensor | int


class Piece(Protocol):
    """A differentiable function of some tensors and of parameters that it reads from modules, in both passes.

    A module's weights are read anew in the backward pass, not kept: engines that cut weights over ranks (ZeRO-3, FSDP2)
    free them in between and gather them again for the module. So a weight that somebody has changed or replaced in
    between would give wrong gradients: what `read` returns is compared, and refused with a RuntimeError, as autograd
    does with what it keeps. A piece without `read` reads only what it trains.
    """

    def trained(self) -> list[Tensor]:
        """The parameters that want a gradient, in a fixed order."""
        ...

    def forward(self, *inputs: Tensor) -> tuple[tuple[Tensor, ...], list[Extra]]:
        """(outputs, extras). Runs without autograd."""
        ...

    def again(self, inputs: Sequence[Tensor], extras: Sequence[Extra]) -> tuple[Tensor, ...]:
        """The outputs once more, with the same bits."""
        ...

    def reads_inputs(self, wanted: bool) -> bool:
        """Whether `backward` reads the inputs; `wanted`: whether it has to return their gradients."""
        ...

    def backward(
        self, inputs: Sequence[Tensor] | None, extras: Sequence[Extra], grads: Sequence[Tensor], wanted: bool
    ) -> tuple[tuple[Tensor | None, ...], list[Tensor | None]]:
        """(gradients of the inputs, where `wanted`; gradients of `trained()`), from the outputs' gradients."""
        ...


def run(piece: Piece, *inputs: Tensor) -> Any:
    """The outputs of `piece` (one tensor, or a tuple), differentiable with respect to `inputs` and `piece.trained()`.

    Once: there is no second derivative. Under `torch.compile` a piece is a call into uncompiled code.
    """
    outputs = _run(piece, inputs)
    return outputs[0] if len(outputs) == 1 else outputs


@uncompiled
def _run(piece: Piece, inputs: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    trained = piece.trained()
    if not torch.is_grad_enabled() or not any(tensor.requires_grad for tensor in (*inputs, *trained)):
        return piece.forward(*inputs)[0]
    outputs: tuple[Tensor, ...] = _Function.apply(piece, len(inputs), *inputs, *trained)
    return outputs


def weights_read(piece: Piece) -> list[Tensor]:
    """The weights that a piece reads in either pass, in a fixed order."""
    found: list[Tensor] = getattr(piece, "read", piece.trained)()
    return found


Mark = tuple["weakref.ref[Tensor]", int]


def _marks(piece: Piece) -> list[Mark]:
    """Which weights there are, and in which state: what `_check` compares."""
    return [(weakref.ref(t), 0 if t.is_inference() else t._version) for t in weights_read(piece)]


def _check(marks: list[Mark], piece: Piece) -> None:
    """RuntimeError where a weight is not the one that the forward pass has read."""
    weights = weights_read(piece)
    if len(weights) != len(marks):
        raise RuntimeError(REPLACED)
    for (reference, version), now in zip(marks, weights, strict=True):
        before = reference()
        if before is None or hasattr(now, "ds_id"):  # an engine has put another in its place
            continue
        if now is before and not now.is_inference() and now._version != version:
            raise RuntimeError(
                "one of the variables needed for gradient computation has been modified by an inplace operation: "
                f"a weight of shape {list(now.shape)} is at version {now._version}; expected version {version} instead"
            )
        if now is not before and now.untyped_storage()._cdata != before.untyped_storage()._cdata:
            raise RuntimeError(REPLACED)


REPLACED = (
    "a weight that the backward pass reads was replaced after the forward pass (by set_adapter, or functional_call): "
    "the gradients would be those of another function"
)


class _Function(torch.autograd.Function):
    """Any piece as one node of autograd's graph.

    Saved: the piece's extras, and its inputs where its backward pass reads them. Nothing is an attribute of the context
    but numbers, so saved-tensor hooks see every byte.
    """

    @staticmethod
    def forward(ctx: Any, piece: Piece, count: int, *tensors: Tensor) -> tuple[Tensor, ...]:
        inputs = tensors[:count]
        outputs, extras = piece.forward(*inputs)
        ctx.piece, ctx.count, ctx.marks = piece, count, _marks(piece)
        ctx.wanted = any(ctx.needs_input_grad[2 : 2 + count])
        ctx.keeps = piece.reads_inputs(ctx.wanted)
        ctx.numbers = [None if isinstance(extra, Tensor) else extra for extra in extras]
        ctx.save_for_backward(*(inputs if ctx.keeps else ()), *(e for e in extras if isinstance(e, Tensor)))
        return outputs

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> tuple[Any, ...]:
        saved = list(ctx.saved_tensors)
        inputs = [saved.pop(0) for _ in range(ctx.count)] if ctx.keeps else None
        extras = [saved.pop(0) if number is None else number for number in ctx.numbers]
        _check(ctx.marks, ctx.piece)
        with torch.autocast(grads[0].device.type, enabled=False):  # pieces remember the forward pass's
            found, trained = ctx.piece.backward(inputs, extras, grads, ctx.wanted)
        return (None, None, *(found if ctx.wanted else [None] * ctx.count), *trained)


class Composed:
    """What pieces made of pieces share: their weights are those of the parts, part by part."""

    def __init__(self, *pieces: Piece) -> None:
        self.pieces = pieces

    def trained(self) -> list[Tensor]:
        return [tensor for piece in self.pieces for tensor in piece.trained()]

    def read(self) -> list[Tensor]:
        return [tensor for piece in self.pieces for tensor in weights_read(piece)]


class Chain(Composed):
    """Pieces one after another: the outputs of each are the inputs of the next.

    Forward: p_n(... p_1(inputs)). Backward: the inputs of every piece that reads them are computed again from the
    chain's own, then the pieces' backward passes run from the last to the first. Keeps: the inputs of the first piece,
    if any piece reads its inputs, and the extras of all pieces.
    """

    def forward(self, *inputs: Tensor) -> tuple[tuple[Tensor, ...], list[Extra]]:
        extras: list[Extra] = []
        self._sizes = []
        for piece in self.pieces:
            inputs, more = piece.forward(*inputs)
            self._sizes.append(len(more))
            extras += more
        return inputs, extras

    def again(self, inputs: Sequence[Tensor], extras: Sequence[Extra]) -> tuple[Tensor, ...]:
        for piece, own in zip(self.pieces, self._split(extras), strict=True):
            inputs = piece.again(inputs, own)
        return tuple(inputs)

    def reads_inputs(self, wanted: bool) -> bool:
        return any(self._readers(wanted))

    def backward(
        self, inputs: Sequence[Tensor] | None, extras: Sequence[Extra], grads: Sequence[Tensor], wanted: bool
    ) -> tuple[tuple[Tensor | None, ...], list[Tensor | None]]:
        own, readers = self._split(extras), self._readers(wanted)
        last = max((i for i, reads in enumerate(readers) if reads), default=0)
        between: list[Sequence[Tensor] | None] = [inputs]
        for i in range(last):
            assert inputs is not None
            inputs = self.pieces[i].again(inputs, own[i])
            between.append(inputs if readers[i + 1] else None)
        del inputs  # the last ones are let go with their piece
        trained: list[Tensor | None] = []
        found: tuple[Tensor | None, ...] = ()
        for i in reversed(range(len(self.pieces))):
            mine = between.pop() if i < len(between) else None
            found, more = self.pieces[i].backward(mine, own[i], grads, self._wanted(i, wanted))
            del mine
            trained = more + trained
            grads = found  # type: ignore[assignment]  # wanted of every piece but the first, if any before it trains
            if i and not self._wanted(i, wanted):
                trained = [*[None] * sum(len(piece.trained()) for piece in self.pieces[:i]), *trained]
                break
        return found, trained

    def _wanted(self, i: int, wanted: bool) -> bool:
        """Whether the gradient of the i-th piece's inputs leads anywhere."""
        return wanted or any(piece.trained() for piece in self.pieces[:i])

    def _readers(self, wanted: bool) -> list[bool]:
        return [piece.reads_inputs(self._wanted(i, wanted)) for i, piece in enumerate(self.pieces)]

    def _split(self, extras: Sequence[Extra]) -> list[Sequence[Extra]]:
        found, start = [], 0
        for size in self._sizes:
            found.append(extras[start : start + size])
            start += size
        return found
