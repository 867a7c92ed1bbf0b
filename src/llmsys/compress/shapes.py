"""Gradients as matrices, and what is worth compressing: arithmetic on shapes, without torch.

A gradient [N, ...] is the matrix [N, M] with M the product of the rest. A vector has no low rank and travels whole.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

from llmsys.compress.config import LOW_RANK, CompressConfig

Shape = Sequence[int]


def matrix(shape: Shape) -> tuple[int, int]:
    """(N, M) of a gradient that has at least two dimensions."""
    return shape[0], math.prod(shape[1:])


def width(shape: Shape, r: int) -> int:
    """The rows of its factors: a matrix has no more than min(N, M) directions."""
    return min(r, *matrix(shape))


def low_rank(name: str, shape: Shape, config: CompressConfig) -> bool:
    """Whether Power-SGD or ACP-SGD sends factors of it; the same matrices at every step of a schedule of ranks."""
    if config.method not in LOW_RANK or len(shape) < 2 or 0 in shape or config.skips(name):
        return False
    return min(matrix(shape)) > config.min_rate * config.widest or not config.min_rate


def kept(numel: int, density: float) -> int:
    """How many of `numel` elements Top-k and Random-k send: at least one, as the published code has it."""
    return min(numel, max(1, round(density * numel)))
