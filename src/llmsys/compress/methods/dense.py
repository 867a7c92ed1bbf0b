"""S-SGD, and S-SGD in 16 bits: every gradient whole."""

from __future__ import annotations

import torch

from llmsys.compress.config import CompressConfig
from llmsys.compress.feedback import spend
from llmsys.compress.methods.method import WAIT, AllReduce, Exchange, Part, Sent

HALF = {"fp16": torch.float16, "bf16": torch.bfloat16}


class Dense:
    """`none`: the bucket itself is summed over the ranks, as DDP does it. `fp16`, `bf16`: a copy of it in that type."""

    linear = True
    rounds = 1

    def __init__(self, config: CompressConfig) -> None:
        self.dtype = HALF.get(config.method)

    def exchange(self, part: Part) -> Exchange:
        taken = spend(part.entries)
        part.flat.div_(part.world)  # before the sum, which then fits into the range of 16 bits
        buffer = part.flat if self.dtype is None else part.flat.to(self.dtype)
        yield AllReduce(buffer)
        yield WAIT
        if buffer is not part.flat:
            part.flat.copy_(buffer)
        arrived = torch.isfinite(part.flat.sum()) if taken else torch.ones((), dtype=torch.bool)
        return Sent(arrived, arrived, taken)  # where nothing was kept, nothing can be spoilt
