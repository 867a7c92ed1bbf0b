"""What is kept of a parameter between steps, and where its random numbers come from.

Everything goes by the parameter's name: buckets may be cut differently tomorrow. Random numbers come from the name, the
seed and the step, drawn on the CPU, so all ranks and devices have the same without a word between them.
"""

from __future__ import annotations

import hashlib

import torch
from torch import Tensor


class Memory:
    """`error` (the gradient's shape): what was not sent yet. `p` [R, N] and `q` [R, M]: the factors of a matrix [N, M]
    as they were last received, fp32, one direction a row.

    Rows, since a skinny product is several times faster on a CPU this way: MKL's E q for q [M, 4] in columns takes
    four times as long as for the same numbers in rows, and E^T p five times.
    """

    def __init__(self, name: str) -> None:
        self.name = name
        self.error: Tensor | None = None
        self.p: Tensor | None = None
        self.q: Tensor | None = None

    def mend(self) -> None:
        """Drops, in place, what is not finite of the error: it would make every later step so."""
        if self.error is not None:
            torch.nan_to_num_(self.error, nan=0.0, posinf=0.0, neginf=0.0)

    def tensors(self) -> dict[str, Tensor]:
        """What is there, by kind: references."""
        found = {"error": self.error, "p": self.p, "q": self.q}
        return {kind: tensor for kind, tensor in found.items() if tensor is not None}


def generator(name: str, seed: int, *more: int) -> torch.Generator:
    """A stream of random numbers on the CPU that depends on these alone."""
    text = "\n".join([name, str(seed), *map(str, more)])
    number = int.from_bytes(hashlib.sha256(text.encode()).digest()[:8], "little", signed=True)
    return torch.Generator().manual_seed(number)
