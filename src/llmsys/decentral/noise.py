"""Noise on what a private stage sends to one that anybody may have: less of it can be read (`attack_task` measures how
much less), and the loss pays for it.

It is drawn anew for each tensor, by its step, micro-batch and name, and the same again for what is computed again: else
whoever asks twice would see the mean of two. The key is told to those who have a private stage, and to nobody else: who
knows it takes the noise away again.
"""

from __future__ import annotations

import dataclasses
import secrets
from pathlib import Path

import numpy as np

from llmsys.decentral.planes import Rules
from llmsys.decentral.wire import Array
from llmsys.files import write_atomic

FILE = "noise.key"


@dataclasses.dataclass(frozen=True, kw_only=True)
class Noise:
    """Gaussian, of `share` of the standard deviation that the elements of a tensor have; on the tensors `names`."""

    share: float
    key: int
    names: tuple[str, ...] = ()

    def added(self, array: Array, rules: Rules, step: int, micro_batch: int, name: str) -> Array:
        """To a tensor of fp32 of that name."""
        flat = np.frombuffer(array.data, np.float32)
        if flat.size < 2:
            return array  # one number has no deviation
        seed = dataclasses.replace(rules, seed=self.key).draw(step, micro_batch, name)
        drawn = np.random.RandomState([seed & 0xFFFFFFFF, seed >> 32]).standard_normal(flat.size)
        with np.errstate(invalid="ignore", over="ignore"):
            noisy = flat + self.share * flat.std(dtype=np.float64, ddof=1) * drawn
            return dataclasses.replace(array, data=noisy.astype(np.float32).tobytes())


def of(share: float, folder: Path) -> Noise | None:
    """What a job's owner adds, None for a share of 0; by the key in `folder`, where a broker that is begun again finds
    it."""
    if not share:
        return None
    path = folder / FILE
    if not path.exists():
        write_atomic(path, str(secrets.randbits(128)), mode=0o600)
    return Noise(share=share, key=int(path.read_text()))
