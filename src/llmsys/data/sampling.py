"""Which examples a step sees: a pure function of (seed, step), so that resuming needs nothing but the step."""

from __future__ import annotations

from functools import lru_cache

import numpy as np


def order(n: int, batch: int, seed: int, step: int) -> list[int]:
    """Indices of the global batch of `step` (from 0) out of `n` examples.

    Every epoch is a fresh permutation from (seed, epoch); epochs follow each other without a gap, so a batch may span
    two, none is short, and each index comes exactly once per epoch.
    """
    if n < 1:
        raise ValueError("the training split is empty")
    assert batch >= 1, batch
    assert step >= 0, step
    indices: list[int] = []
    position = step * batch
    while len(indices) < batch:
        epoch, offset = divmod(position, n)
        taken = _permutation(n, seed, epoch)[offset : offset + batch - len(indices)]
        indices += taken.tolist()
        position += len(taken)
    return indices


@lru_cache(maxsize=4)
def _permutation(n: int, seed: int, epoch: int) -> np.ndarray:
    """Of RandomState, whose stream numpy has promised not to change, so that machines agree."""
    bits = np.random.MT19937(np.random.SeedSequence((seed, epoch)))
    permutation = np.random.RandomState(bits).permutation(n)
    permutation.flags.writeable = False
    return permutation
