"""`llmsys.lorafa.pieces` joined: chains, residuals, branches and pieces side by side, as nodes of autograd's graph."""

from __future__ import annotations

from collections.abc import Iterator

from llmsys.cost.cores import Core
from llmsys.cost.notes import Tensor
from llmsys.cost.pieces import Piece
from llmsys.cost.tape import Tape
from llmsys.cost.work import AGAIN, BACKWARD, FORWARD, Op


def run(tape: Tape, piece: Piece, *inputs: Tensor) -> tuple[Tensor, ...]:
    """Plays `piece` as one node of autograd's graph."""
    outputs, extras = piece.play(*inputs)
    wanted = any(x.grad for x in inputs)
    tape.uses(*inputs)
    _work(tape, piece, wanted)
    if not wanted and not piece.trained:
        return outputs
    kept = [*(inputs if piece.reads_inputs(wanted) else ()), *extras]
    if kept:
        tape.save(*kept)
    tape.read[tape.part] += piece.read
    tape.passes(tape.coming(sum(x.nbytes for x in outputs)), piece.passing(wanted))
    return tuple(x._replace(grad=True) for x in outputs)


def _work(tape: Tape, piece: Piece, wanted: bool) -> None:
    """Notes the FLOPs of `piece`, those of attention in a chain apart from the rest."""
    derived = wanted or piece.trained
    for passed in (FORWARD, *((BACKWARD, AGAIN) if derived else ())):
        tape.ops[tape.part] += _again(piece, wanted) if passed == AGAIN else piece.ops(passed, wanted)
    forward, backward, again = piece.forward(), 0.0, 0.0
    if derived:
        backward, again = piece.backward(wanted), piece.recomputed(wanted)
    for core, needed in _cores(piece, wanted):
        for each in core.played.products:
            tape.work(each.forward, needed * each.backward, needed * each.forward, each.module)
        forward -= core.forward()
        backward, again = backward - core.backward(needed), again - core.recomputed(needed)
    tape.work(forward, backward, again)


def _again(piece: Piece, wanted: bool) -> list[Op]:
    """What `recomputed` counts, as operators."""
    if isinstance(piece, Core):
        return piece.ops(AGAIN, wanted)
    return piece.recomputed_ops(wanted) if isinstance(piece, (Chain, _Around, Beside)) else []


def _cores(piece: Piece, wanted: bool) -> Iterator[tuple[Core, bool]]:
    """Each part between attention's projections, and whether the gradients of its inputs are wanted."""
    if isinstance(piece, Core):
        yield piece, wanted
    elif isinstance(piece, Chain):
        for i, each in enumerate(piece.pieces):
            yield from _cores(each, piece._wanted(i, wanted))


def run_apart(tape: Tape, piece: Piece, *inputs: Tensor) -> tuple[Tensor, ...]:
    """As `run`; pieces side by side each as a node of its own."""
    if isinstance(piece, Beside):
        return tuple(y for own, x in zip(piece.pieces, inputs, strict=True) for y in run_apart(tape, own, x))
    return run(tape, piece, *inputs)


class Chain:
    """Pieces one after another: keeps the inputs of the first, if any piece reads its own, and all extras."""

    def __init__(self, *pieces: Piece) -> None:
        self.pieces = pieces
        self.trained = any(piece.trained for piece in pieces)
        self.read = sum(piece.read for piece in pieces)

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
        """Up to the last piece that reads its inputs, and what the pieces compute again by themselves."""
        last = max(self._readers(wanted), default=0)
        own = sum(piece.recomputed(self._wanted(i, wanted)) for i, piece in enumerate(self.pieces))
        return sum(piece.again() for piece in self.pieces[:last] if not isinstance(piece, Core)) + own

    def ops(self, passed: str, wanted: bool) -> list[Op]:
        return [op for i, each in enumerate(self.pieces) for op in each.ops(passed, self._wanted(i, wanted))]

    def recomputed_ops(self, wanted: bool) -> list[Op]:
        last = max(self._readers(wanted), default=0)
        again = [op for each in self.pieces[:last] if not isinstance(each, Core) for op in each.ops(AGAIN, wanted)]
        return again + [op for i, each in enumerate(self.pieces) for op in _again(each, self._wanted(i, wanted))]

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


class _Around:
    """One piece with a way past it: keeps what the piece keeps."""

    def __init__(self, tape: Tape, piece: Piece) -> None:
        self.tape, self.piece = tape, piece
        self.trained = piece.trained
        self.read = piece.read
        self.nbytes = 0  # of the input, once it was played

    def reads_inputs(self, wanted: bool) -> bool:
        return self.piece.reads_inputs(wanted)

    def forward(self) -> float:
        return self.piece.forward()

    def again(self) -> float:
        return self.piece.again()

    def recomputed(self, wanted: bool) -> float:
        return self.piece.recomputed(wanted)

    def backward(self, wanted: bool) -> float:
        return self.piece.backward(wanted)

    def ops(self, passed: str, wanted: bool) -> list[Op]:
        """With the sum, of values or of gradients."""
        return [*self.piece.ops(passed, wanted), Op(passed, "stream", 0.0, 3.0 * self.nbytes)]

    def recomputed_ops(self, wanted: bool) -> list[Op]:
        return _again(self.piece, wanted)

    def passing(self, wanted: bool) -> int:
        """What the piece makes; at the end the gradient by it, and the sum with the one that came past."""
        return max(self.piece.passing(wanted), 2 * self.nbytes * wanted)


class Residual(_Around):
    """x + p(x)."""

    def play(self, *inputs: Tensor) -> tuple[tuple[Tensor, ...], list[Tensor]]:
        (y,), extras = self.piece.play(*inputs)
        self.nbytes = inputs[0].nbytes
        return (self.tape.like(inputs[0], y)._replace(grad=False),), extras


class Branch(_Around):
    """x -> (x, p(x))."""

    def play(self, *inputs: Tensor) -> tuple[tuple[Tensor, ...], list[Tensor]]:
        outputs, extras = self.piece.play(*inputs)
        self.nbytes = inputs[0].nbytes
        return (*inputs, *outputs), extras


class Beside:
    """(x_1, x_2, ...) -> p_1(x_1), p_2(x_2), ...: keeps what the pieces keep, and all inputs if one reads its own."""

    def __init__(self, *pieces: Piece) -> None:
        self.pieces = pieces
        self.trained = any(piece.trained for piece in pieces)
        self.read = sum(piece.read for piece in pieces)

    def play(self, *inputs: Tensor) -> tuple[tuple[Tensor, ...], list[Tensor]]:
        played = [piece.play(x) for piece, x in zip(self.pieces, inputs, strict=True)]
        self.inputs = inputs
        return tuple(y for outputs, _ in played for y in outputs), [x for _, extras in played for x in extras]

    def reads_inputs(self, wanted: bool) -> bool:
        return any(piece.reads_inputs(wanted) for piece in self.pieces)

    def forward(self) -> float:
        return sum(piece.forward() for piece in self.pieces)

    def again(self) -> float:
        return sum(piece.again() for piece in self.pieces)

    def recomputed(self, wanted: bool) -> float:
        return sum(piece.recomputed(wanted) for piece in self.pieces)

    def backward(self, wanted: bool) -> float:
        return sum(piece.backward(wanted) for piece in self.pieces)

    def passing(self, wanted: bool) -> int:
        """What a piece makes, beside the gradients of the inputs before it."""
        before = [sum(x.nbytes for x in self.inputs[:i]) * wanted for i in range(len(self.pieces))]
        return max(had + piece.passing(wanted) for had, piece in zip(before, self.pieces, strict=True))

    def ops(self, passed: str, wanted: bool) -> list[Op]:
        return [op for piece in self.pieces for op in piece.ops(passed, wanted)]

    def recomputed_ops(self, wanted: bool) -> list[Op]:
        return [op for piece in self.pieces for op in _again(piece, wanted)]
