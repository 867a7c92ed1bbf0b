"""Orthonormal rows that span what a factor's rows span."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor


def orthonormal_(rows: Tensor) -> None:
    """Makes the rows of `rows` [R, N], R <= N, fp32 or fp64, orthonormal, in place, with the same span.

    Householder's QR: of rows that are equal or zero it makes some orthonormal set, without NaN.
    """
    rows.copy_(torch.linalg.qr(rows.t()).Q.t())


def all_orthonormal_(factors: Sequence[Tensor]) -> None:
    """The same of each of `factors`, which are on one device.

    On a GPU, those of one shape together: a QR is a chain of small kernels there, so many matrices take hardly longer
    than one. LAPACK takes one after another, and what it makes of one may depend on where it lies, so that buckets cut
    otherwise would change the last bit.
    """
    if not factors or not factors[0].is_cuda:
        for rows in factors:
            orthonormal_(rows)
        return
    together_(factors)


def together_(factors: Sequence[Tensor]) -> None:
    """`all_orthonormal_`, with one QR for each shape."""
    alike: dict[tuple[torch.Size, torch.dtype], list[Tensor]] = {}
    for rows in factors:
        alike.setdefault((rows.shape, rows.dtype), []).append(rows)
    for group in alike.values():
        made = torch.linalg.qr(torch.stack(group).mT).Q.mT
        torch._foreach_copy_(group, list(made.unbind()))
