"""The pieces of a chain that attend: `llmsys.lorafa.pieces`' attention on the tape.

As `pieces`: what their functions keep, compute again and multiply.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

from llmsys.cost.notes import Tensor
from llmsys.cost.pieces import Free
from llmsys.cost.work import BACKWARD, FORWARD, Op

if TYPE_CHECKING:
    from llmsys.cost.walk import Walk


class Core(Free):
    """Attention between its projections, computed again with autograd in the backward pass: keeps `held`, the masks and
    rotations that it reads."""

    def __init__(self, walk: Walk, core: Callable[..., Tensor], *held: Tensor | None) -> None:
        self.walk, self.core = walk, core
        self.held = [tensor for tensor in held if tensor is not None]

    def play(self, *inputs: Tensor) -> tuple[tuple[Tensor, ...], list[Tensor]]:
        own, tape = [x._replace(grad=True) for x in inputs], self.walk.tape
        self.played = tape.aside(lambda: self.core(*own))
        # the chain counts the inputs, and the gradient that comes in
        again = {x.storage for x in inputs} & self.played.saved.keys()
        self.nbytes = self.played.passing - tape.bytes_of(again) - self.played.out.nbytes
        return (self.played.out._replace(grad=False),), self.held

    def forward(self) -> float:
        return self.played.forward

    def recomputed(self, wanted: bool) -> float:
        """Once, for its derivative and for a later piece that reads its output."""
        return wanted * self.played.forward

    def backward(self, wanted: bool) -> float:
        return wanted * self.played.backward

    def ops(self, passed: str, wanted: bool) -> list[Op]:
        if passed != FORWARD and not wanted:
            return []
        own = BACKWARD if passed == BACKWARD else FORWARD
        return [op._replace(passed=passed) for op in self.played.ops if op.passed == own]

    def passing(self, wanted: bool) -> int:
        return wanted * self.nbytes


class Scores(Free):
    """Attention with dropout on its probabilities on a CPU: keeps q [B, H, L, W], k, v [B, H', L', W] and the mask.
    `product`: FLOPs of q k^T."""

    def __init__(self, walk: Walk, bias: Tensor | None, product: float) -> None:
        self.walk, self.product = walk, product
        self.given = [] if bias is None else [bias]

    def play(self, *inputs: Tensor) -> tuple[tuple[Tensor, ...], list[Tensor]]:
        q = inputs[0]
        head_dim = self.walk.transformer.head_width
        scores = int(self.product) // (2 * head_dim)
        # probabilities, their mask, and the gradients of what was dropped and of the scores, all in fp32
        self.nbytes = 4 * 4 * scores + sum(x.nbytes for x in inputs)
        if q.width < 4:  # operands, their gradients and the output's in fp32 too
            self.nbytes += 2 * sum(4 * x.numel for x in inputs) + 4 * q.numel
        return (self.walk.tape.new(q.numel, q.width, False),), self.given

    def forward(self) -> float:
        return 2 * self.product

    def again(self) -> float:
        return 2 * self.product

    def backward(self, wanted: bool) -> float:
        """dq, dk, dv, dP, and as in every kernel the scores once more."""
        return wanted * 5 * self.product

    def passing(self, wanted: bool) -> int:
        return wanted * self.nbytes

    def ops(self, passed: str, wanted: bool) -> list[Op]:
        if passed == BACKWARD and not wanted:
            return []
        number, streams = (5, 14.0) if passed == BACKWARD else (2, 5.0)
        case, model = self.walk.case, self.walk.transformer
        scores = self.product / (2 * model.head_width)
        matrices = case.train.micro_batch * model.num_heads // case.cut
        return [
            Op(passed, "batched", number * self.product, 4.0 * number * scores, number, matrices),
            Op(passed, "exp", 0.0, 4 * streams * scores, number),
        ]
