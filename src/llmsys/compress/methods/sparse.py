"""Top-k SGD (Aji and Heafield, arXiv 1704.05021; Lin et al., DGC, arXiv 1712.01887) and Random-k: few of the elements.

Each rank's largest elements are its own, so places travel too and all ranks' have to be gathered: volume grows with
their number. Random-k draws the same places on all ranks, so values alone are summed: what this saves, and what it
costs to send others than the largest, is what the comparison of the two at equal bytes shows.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from llmsys.compress.config import CompressConfig
from llmsys.compress.feedback import corrected, spend
from llmsys.compress.memory import generator
from llmsys.compress.methods.method import WAIT, AllGather, AllReduce, Entry, Exchange, Part, Taken, where
from llmsys.compress.wire import Wire, copy, dtype_of, rounded
from llmsys.cost import compressed as shapes

SAMPLED = 0.01
"""Of the elements, on which a threshold is estimated."""
SPARE = 1.5
"""How many more elements than are needed should be above the threshold."""
PIECE = 1 << 18
"""Elements whose magnitudes are there at a time."""
ROOM = 1 << 19
"""Candidates that are kept, beside the best so far, before the best are chosen among them; or as many as are chosen,
where these are more."""


@dataclass
class Kept:
    """The elements of a gradient that are sent: `values` [K] of `what` (flat) at `places` [K]."""

    entry: Entry
    what: Tensor
    places: Tensor
    values: Tensor

    @classmethod
    def chosen(cls, entry: Entry, what: Tensor, places: Tensor, config: CompressConfig) -> Kept:
        """Values as they will be on the wire. Where errors have more bits than gradients, what has waited long may be
        too large for a gradient: of that, half of the largest number that it can be, which rounding the ranks' shares
        does not make infinite."""
        values = what[places].to(dtype_of(what))
        if what.dtype != entry.grad.dtype:
            most = torch.finfo(entry.grad.dtype).max / 2
            values = torch.where(values.isfinite(), values.clamp(-most, most), values)
        return cls(entry, what, places, rounded(values, config))

    def take(self) -> None:
        """What is sent is no error any more."""
        self.what.index_add_(0, self.places, self.values.to(self.what.dtype), alpha=-1)

    def give_back(self, share: Tensor | float) -> None:
        self.what.index_add_(0, self.places, (self.values * share).to(self.what.dtype))


def take(kept: Sequence[Kept], config: CompressConfig) -> list[Taken]:
    """From the memories, where errors are kept."""
    if not config.feedback:
        return []
    for x in kept:
        x.take()
    return [Taken(x.entry, x.what, x.give_back) for x in kept]


class TopK:
    """Of every tensor the `density` largest by magnitude, as fp32 values (of fp64: fp64) and int32 places: one gather.

    What is excepted (`skip`) travels whole in the same gather.
    """

    linear = False
    rounds = 1

    def __init__(self, config: CompressConfig) -> None:
        self.config = config

    def exchange(self, part: Part) -> Exchange:
        finite = part.guard()
        sparse, whole = part.split(self.config)
        if sparse and part.flat.numel() >= 2**31:
            there = f"{sparse[0].name}: in a bucket of {part.flat.numel()} elements"
            raise ValueError(f"{there}; places are 31 bits, so name it in skip")
        taken = spend(whole if self.config.feedback else part.entries)
        kept = [self._select(entry, part.step) for entry in sparse]
        dtype = dtype_of(part.flat)
        values = torch.cat([*(x.values for x in kept), *(entry.grad.reshape(-1).to(dtype) for entry in whole)])
        where(~finite, values, math.nan)
        payload = torch.cat([values.view(torch.int32), *(x.places.int() for x in kept)])
        length = len(values) * dtype.itemsize // 4
        _to_bucket(payload[length:], kept, part)
        del values
        gathered = payload.new_empty(part.world, len(payload))
        yield AllGather(payload, gathered)
        taken += take(kept, self.config)
        yield WAIT
        del payload
        values, places = gathered[:, :length], gathered[:, length:]
        if dtype.itemsize > 4:  # which may begin anywhere in them
            values = values.clone(memory_format=torch.contiguous_format)
        values = values.view(dtype)
        arrived = torch.isfinite(values.sum())
        part.undo(arrived, taken)
        self._add(part, whole, values, places, arrived)
        return part.sent(arrived, taken)

    def _select(self, entry: Entry, step: int) -> Kept:
        what = corrected(entry, self.config).view(-1)
        k = shapes.kept(what.numel(), self.config.density)
        if self.config.select == "exact":
            places = largest(what, k)
        else:
            places = above(what, k, generator(entry.name, self.config.seed, step))
        return Kept.chosen(entry, what, places, self.config)

    def _add(self, part: Part, whole: list[Entry], values: Tensor, places: Tensor, finite: Tensor) -> None:
        """Every gradient becomes, in place, the mean of what the ranks have sent of it, in the order of the ranks."""
        sparse = places.shape[1]
        part.flat.zero_()
        for rank in range(part.world):  # one rank's places are all different: the order of sums is certain
            shares = values[rank, :sparse] / part.world
            part.flat.index_add_(0, places[rank], shares.to(part.flat.dtype))
        pieces = (values[:, sparse:] / part.world).split([entry.grad.numel() for entry in whole], 1)
        for entry, piece in zip(whole, pieces, strict=True):
            entry.grad.copy_(piece.sum(0).view(entry.grad.shape))
        where(~finite, part.flat, math.nan)


def _to_bucket(places: Tensor, kept: list[Kept], part: Part) -> None:
    """Makes places in each of the tensors `kept`, one after another, in place, those in the bucket: then all that a
    rank has sent is added at once."""
    for x, piece in zip(kept, places.split([len(x.places) for x in kept]), strict=True):
        piece += x.entry.grad.storage_offset() - part.flat.storage_offset()


class Best:
    """The k largest of magnitudes that come in pieces, with their places. No more than k and `ROOM`, or 2 k, are there
    at a time: with every piece's k largest there would be more than gradients, if these are many and k is."""

    def __init__(self, like: Tensor, k: int, most: int) -> None:
        """Magnitudes of the type of `like`; `most`: how many may come."""
        size = min(most, k + max(k, ROOM, PIECE))
        self._k, self._count = k, 0
        self._magnitudes = torch.empty(size, dtype=like.dtype, device=like.device)
        self._places = torch.empty(size, dtype=torch.int32, device=like.device)

    def add(self, magnitudes: Tensor, places: Tensor) -> None:
        """At most `PIECE` of them."""
        if self._count + len(places) > len(self._places):
            self._choose()
        new = slice(self._count, self._count + len(places))
        self._magnitudes[new], self._places[new] = magnitudes, places
        self._count += len(places)

    def places(self) -> Tensor:
        """Of the k largest, int32 [K]."""
        return self._places[torch.topk(self._magnitudes[: self._count], self._k, sorted=False).indices]

    def _choose(self) -> None:
        found = torch.topk(self._magnitudes[: self._count], self._k, sorted=False)
        self._magnitudes[: self._k], self._places[: self._k] = found.values, self._places[found.indices]
        self._count = self._k


def largest(x: Tensor, k: int) -> Tensor:
    """Places (int32) of the k elements of x [N] that are largest by magnitude: the largest of its pieces' largest, as
    the magnitudes of all of it would be another copy of the gradient.

    Where `Best` has room for all candidates it is one choice among them; beyond that, of elements equal to the last
    which is chosen, others may be.
    """
    if x.numel() <= PIECE:
        return torch.topk(x.abs(), k, sorted=False).indices.int()
    starts = range(0, x.numel(), PIECE)
    best = Best(x, k, sum(min(k, PIECE, x.numel() - start) for start in starts))
    for start in starts:
        piece = x[start : start + PIECE].abs()
        found = torch.topk(piece, min(k, len(piece)), sorted=False)
        best.add(found.values, found.indices + start)
        del piece, found  # before the next ones are made
    return best.places()


def above(x: Tensor, k: int, source: torch.Generator) -> Tensor:
    """The same, of those elements alone that are above a threshold. It is estimated on a sample, and low enough that
    more than k are above it; where they are fewer, it is lowered.

    They are counted piece by piece and the counts read at once, so that a GPU is waited for once, not at every piece.
    """
    number = min(x.numel(), max(1024, round(SAMPLED * x.numel())))
    sample = x[torch.randint(x.numel(), (number,), generator=source).to(x.device)].abs()
    share = min(1.0, SPARE * k / x.numel())
    least = torch.topk(sample, math.ceil(number * share)).values.min()
    starts = range(0, x.numel(), PIECE)
    while True:
        counts = torch.stack([_above(x, start, least)[1].sum() for start in starts]).tolist()
        if sum(counts) >= k:
            break
        least = torch.where((least > 1e-30) & least.isfinite(), least / 2, 0.0)  # half of inf would be found for ever
    best = Best(x, k, sum(counts))
    for start, count in zip(starts, counts, strict=True):
        magnitudes, mask = _above(x, start, least)
        places = torch.nonzero_static(mask, size=count).view(-1)
        best.add(magnitudes[places], places + start)
        del magnitudes, mask, places
    return best.places()


def _above(x: Tensor, start: int, least: Tensor) -> tuple[Tensor, Tensor]:
    """The magnitudes of a piece, and which are not below `least`: NaN is not, and is to be noticed."""
    magnitudes = x[start : start + PIECE].abs()
    return magnitudes, (magnitudes < least).logical_not_()


class RandomK:
    """Of every tensor the `density` that a generator shared by all ranks draws: one of each stratum of the tensor."""

    linear = True
    rounds = 1

    def __init__(self, config: CompressConfig) -> None:
        self.config = config

    def exchange(self, part: Part) -> Exchange:
        finite = part.guard()
        sparse, whole = part.split(self.config)
        taken = spend(whole if self.config.feedback else part.entries)
        kept = [self._select(entry, part.step) for entry in sparse]
        wire = Wire([*(x.values for x in kept), *(entry.grad for entry in whole)], self.config, bool(kept))
        wire.divide(part.world, finite)
        yield AllReduce(wire.buffer)
        taken += take(kept, self.config)
        yield WAIT
        arrived = wire.finite()
        part.undo(arrived, taken)
        for x, mean in zip(kept, wire.views, strict=False):
            flat = x.entry.grad.view(-1).zero_()
            flat[x.places] = mean.to(flat.dtype)
        copy([entry.grad for entry in whole], wire.views[len(kept) :])
        where(~arrived, part.flat, math.nan)
        return part.sent(arrived, taken)

    def _select(self, entry: Entry, step: int) -> Kept:
        what = corrected(entry, self.config).view(-1)
        places = strata(
            what.numel(), shapes.kept(what.numel(), self.config.density), entry.name, self.config.seed, step
        )
        places = places.to(what.device)
        return Kept.chosen(entry, what, places, self.config)


def strata(numel: int, k: int, name: str, seed: int, step: int) -> Tensor:
    """k different places of `numel`, one drawn evenly from each of k equal parts: every place as likely as any other.

    A permutation would cost as much as the exact Top-k.
    """
    edges = torch.arange(k + 1, dtype=torch.int64) * numel // k
    drawn = torch.rand(k, generator=generator(name, seed, step), dtype=torch.float64)
    return edges[:-1] + (drawn * (edges[1:] - edges[:-1])).long()
