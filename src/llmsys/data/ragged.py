"""Rows of tokens of different lengths in one flat array, and batches of them as padded rectangles."""

from __future__ import annotations

from collections.abc import Iterable

import numpy as np

FULL = -1
"""`pad_to` of a batch: the length that rows were encoded for."""
IGNORE = -100
"""The label of a position without loss, as torch's cross entropy has it."""


class Ragged:
    """Row `i` is `flat[starts[i]:starts[i + 1]]`. int32: every vocabulary fits, and a corpus is 16 million tokens."""

    def __init__(self, flat: np.ndarray, starts: np.ndarray) -> None:
        self.flat, self.starts = flat, starts
        self.lengths = np.diff(starts)

    @classmethod
    def of(cls, rows: Iterable[list[int]]) -> Ragged:
        """At least one row."""
        arrays = [np.array(row, dtype=np.int32) for row in rows]
        starts = np.zeros(len(arrays) + 1, dtype=np.int64)
        np.cumsum([len(array) for array in arrays], out=starts[1:])
        return cls(np.concatenate(arrays), starts)

    def padded(self, indices: list[int], width: int | None, fill: int) -> tuple[np.ndarray, np.ndarray]:
        """(int64 [B, L] padded on the right with `fill`, bool [B, L] that is true where a token stands). L is `width`,
        or the longest of these rows."""
        assert indices
        lengths = self.lengths[indices]
        longest = int(lengths.max())
        width = longest if width is None else width
        assert width >= longest, f"pad_to={width} is shorter than a row of {longest} tokens"
        mask = np.arange(width) < lengths[:, None]
        ids = np.full(mask.shape, fill, dtype=np.int64)
        ids[mask] = np.concatenate([self.flat[self.starts[i] : self.starts[i + 1]] for i in indices])
        return ids, mask
