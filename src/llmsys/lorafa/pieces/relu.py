"""ReLU whose derivative is kept as what it is: one bit an element."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from llmsys.lorafa.pieces.piece import Extra

# Eight bytes of 0 or 1 are one int64. Its product with GATHER has byte i's bit at position 56 + i; copies of that byte
# in all eight places, one bit let through in each, are the eight bytes again.
GATHER = sum(2 ** (56 - 7 * i) for i in range(8))
COPIES = sum(2 ** (8 * i) for i in range(8))
ONE_EACH = sum(2 ** (9 * i) for i in range(8)) - 2**64  # as a signed number


def packed(mask: Tensor) -> Tensor:
    """A boolean tensor of any shape as bits: uint8 [elements / 8, rounded up], in an order of its own."""
    flat = mask.flatten()
    if flat.numel() % 8:
        flat = torch.nn.functional.pad(flat, (0, -flat.numel() % 8))
    return (flat.view(torch.int64) * GATHER).bitwise_right_shift_(56).to(torch.uint8)


def unpacked(bits: Tensor, shape: Sequence[int]) -> Tensor:
    """What `packed` was given, of that shape."""
    spread = (bits.to(torch.int64) * COPIES).bitwise_and_(ONE_EACH)
    return spread.view(torch.uint8).to(torch.bool)[: torch.Size(shape).numel()].view(*shape)


class ReLU:
    """y = max(x, 0). Backward: dx = dy where x > 0. Keeps: whether x > 0, 1/8 byte an element.

    For a layer behind it that does not read y; one that does (a trained A) needs y itself, and `Activation` then keeps
    x, from which it is made again. torch's own keeps y, which a layer behind it keeps too.
    """

    def trained(self) -> list[Tensor]:
        return []

    def forward(self, *inputs: Tensor) -> tuple[tuple[Tensor, ...], list[Extra]]:
        (x,) = inputs
        return (torch.relu(x),), [packed(x > 0)]

    def again(self, inputs: Sequence[Tensor], extras: Sequence[Extra]) -> tuple[Tensor, ...]:
        return (torch.relu(inputs[0]),)

    def reads_inputs(self, wanted: bool) -> bool:
        return False

    def backward(
        self, inputs: Sequence[Tensor] | None, extras: Sequence[Extra], grads: Sequence[Tensor], wanted: bool
    ) -> tuple[tuple[Tensor | None, ...], list[Tensor | None]]:
        if not wanted:
            return (None,), []
        bits = extras[0]
        assert isinstance(bits, Tensor)
        (dy,) = grads
        return (
            unpacked(bits, dy.shape).to(dy.dtype).mul_(dy),
        ), []  # dy times a boolean takes a CPU seven times as long
