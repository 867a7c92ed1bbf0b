"""Orthonormal rows that span what a factor's rows span."""

from __future__ import annotations

import torch
from torch import Tensor


def orthonormal_(rows: Tensor) -> None:
    """Makes the rows of `rows` [R, N], R <= N, fp32 or fp64, orthonormal, in place, with the same span.

    Householder's QR: of rows that are equal or zero it makes some orthonormal set, without NaN.
    """
    rows.copy_(torch.linalg.qr(rows.t()).Q.t())
