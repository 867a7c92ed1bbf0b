"""Sign-SGD with majority vote (Bernstein et al., arXiv 1802.04434, 1810.05291): a bit of each element, there and back.

Gathering every rank's signs costs each rank world x N / 8 bytes. Here rank j counts the votes on the j-th part of the
bucket: it is sent that part by all (all-to-all) and sends its result to all (all-gather), each N / 8 bytes in all,
however many ranks there are.

A tie goes the way that rank `step mod world` voted, so that no direction is preferred: at two ranks every second
element is one. A gradient of exactly zero votes + on even steps and - on odd ones.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from llmsys.compress import bits
from llmsys.compress.config import CompressConfig
from llmsys.compress.feedback import spend
from llmsys.compress.methods.method import WAIT, AllGather, AllToAll, Exchange, Part, where


class Sign:
    """Gradients become +1 or -1. Nothing is kept between steps."""

    linear = False
    rounds = 2

    def __init__(self, config: CompressConfig) -> None:
        pass

    def exchange(self, part: Part) -> Exchange:
        finite = part.guard()
        taken = spend(part.entries)
        packed = bits.pack(part.flat, zero=part.step % 2 == 0)
        size = math.ceil(len(packed) / part.world)
        votes = packed.new_zeros(part.world * size)
        votes[: len(packed)] = packed
        ballots = _with_flag(votes.view(part.world, size), finite)
        cast = torch.empty_like(ballots)
        yield AllToAll(ballots, cast)
        yield WAIT
        result = _with_flag(
            majority(cast[:, :-1], part.step % part.world).unsqueeze(0), (cast[:, -1] > 0).all()
        ).squeeze(0)
        results = result.new_empty(part.world, len(result))
        yield AllGather(result, results)
        yield WAIT
        arrived = (results[:, -1] > 0).all()
        part.flat.zero_()
        bits.add_signs(part.flat, results[:, :-1].reshape(-1)[: len(packed)], 1.0)
        where(~arrived, part.flat, math.nan)
        return part.sent(arrived, taken)


def majority(votes: Tensor, decides: int) -> Tensor:
    """uint8 [N] of votes uint8 [world, N], bit by bit; where as many are for as against, the vote of rank `decides`."""
    world = len(votes)
    result = torch.zeros_like(votes[0])
    for start in range(0, len(result), bits.AT_ONCE):
        piece = votes[:, start : start + bits.AT_ONCE]
        for bit in range(8):
            mine = (piece >> bit) & 1
            twice = 2 * mine.sum(0, dtype=torch.int32) - world
            won = (twice > 0) | ((twice == 0) & (mine[decides] == 1))
            result[start : start + bits.AT_ONCE] |= won.to(torch.uint8) << bit
    return result


def _with_flag(rows: Tensor, finite: Tensor) -> Tensor:
    """One more byte a row: 1 where the sender's gradients are finite, which no sign could say."""
    flag = finite.to(torch.uint8).expand(len(rows), 1)
    return torch.cat([rows, flag], 1)
