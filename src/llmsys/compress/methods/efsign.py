"""Scaled sign with error feedback (Karimireddy et al., arXiv 1901.09847): mean(|c|) sign(c), c = gradient + error."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from functools import partial

import torch
from torch import Tensor

from llmsys.compress import bits
from llmsys.compress.config import CompressConfig
from llmsys.compress.feedback import corrected, spend
from llmsys.compress.methods.method import WAIT, AllGather, Entry, Exchange, Part, Taken, where
from llmsys.compress.wire import dtype_of


class EFSign:
    """One bit of each element and one fp32 scale of each tensor, of every rank: their mean is no sign any more."""

    linear = False
    rounds = 1

    def __init__(self, config: CompressConfig) -> None:
        self.config = config

    def exchange(self, part: Part) -> Exchange:
        finite = part.guard()
        signed, whole = part.split(self.config)
        taken = spend(whole if self.config.feedback else part.entries)
        what = [corrected(entry, self.config).view(-1) for entry in signed]
        dtype = dtype_of(part.flat)
        scales = [torch.linalg.vector_norm(x, 1, dtype=dtype).reshape(1) / x.numel() for x in what]
        numbers = torch.cat([*scales, *(entry.grad.reshape(-1).to(dtype) for entry in whole)])
        where(~finite, numbers, math.nan)
        payload = torch.cat([numbers.view(torch.uint8), *(bits.pack(x) for x in what)])
        length, sizes = len(numbers) * dtype.itemsize, [math.ceil(x.numel() / 8) for x in what]
        own = payload[length:].split(sizes)
        gathered = payload.new_empty(part.world, len(payload))
        yield AllGather(payload, gathered)
        if self.config.feedback:
            taken += self._take(signed, what, own, scales)
        yield WAIT
        theirs = gathered[:, :length].clone(memory_format=torch.contiguous_format).view(dtype)
        arrived = torch.isfinite(theirs.sum())
        part.undo(arrived, taken)
        shares = (theirs[:, : len(signed)] / part.world).to(part.flat.dtype)
        _write_signs([entry.grad.view(-1) for entry in signed], gathered[:, length:], shares)
        self._write_whole(whole, theirs[:, len(signed) :].mean(0))
        where(~arrived, part.flat, math.nan)
        return part.sent(arrived, taken)

    def _take(
        self, entries: list[Entry], what: list[Tensor], own: Sequence[Tensor], scales: list[Tensor]
    ) -> list[Taken]:
        """What is sent is no error any more."""
        self._add(what, own, [-scale for scale in scales])
        back = [partial(_give_back, *each) for each in zip(what, own, scales, strict=True)]
        return [Taken(*each) for each in zip(entries, what, back, strict=True)]

    def _add(self, targets: list[Tensor], packed: Sequence[Tensor], scales: list[Tensor]) -> None:
        for target, signs, scale in zip(targets, packed, scales, strict=False):
            bits.add_signs(target, signs, scale)

    def _write_whole(self, entries: list[Entry], numbers: Tensor) -> None:
        for entry, piece in zip(entries, numbers.split([e.grad.numel() for e in entries]), strict=True):
            entry.grad.copy_(piece.view(entry.grad.shape))


def _give_back(what: Tensor, signs: Tensor, scale: Tensor, share: Tensor | float) -> None:
    bits.add_signs(what, signs, scale * share)


def _write_signs(targets: Sequence[Tensor], packed: Tensor, shares: Tensor) -> None:
    """Each of `targets`, in place, becomes the sum, in the order of the ranks, of its signs (uint8 [world, bytes], one
    target after another) times each rank's `shares` [world, targets] of it.

    So many bytes of all ranks at a time, whichever targets they are of: one after another these would be world x
    targets calls, of which a GPU does each in less time than it takes to ask for it.
    """
    table = bits.table(packed.device).to(shares.dtype)
    start = 0
    for group in _spans([math.ceil(target.numel() / 8) for target in targets]):
        stop = start + sum(count for _, _, count in group)
        scales = torch.cat([shares[:, i : i + 1].expand(-1, count) for i, _, count in group], 1).unsqueeze(2)
        total = shares.new_zeros(stop - start, 8)
        for rank in range(len(packed)):
            total.addcmul_(table[packed[rank, start:stop].long()], scales[rank])
        signs = total.view(-1).split([8 * count for _, _, count in group])
        for (i, first, count), piece in zip(group, signs, strict=True):
            target = targets[i][8 * first : 8 * (first + count)]
            target.copy_(piece[: len(target)])
        del total, signs, piece, scales  # before the next ones are made
        start = stop


def _spans(sizes: Sequence[int]) -> Iterator[list[tuple[int, int, int]]]:
    """Bytes of tensors that follow one another, `bits.AT_ONCE` at a time: (tensor, its first byte, how many) of each
    that has some among them."""
    group: list[tuple[int, int, int]] = []
    room = bits.AT_ONCE
    for i, size in enumerate(sizes):
        first = 0
        while first < size:
            count = min(room, size - first)
            group.append((i, first, count))
            first, room = first + count, room - count
            if not room:
                yield group
                group, room = [], bits.AT_ONCE
    if group:
        yield group
