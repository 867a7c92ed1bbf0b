"""torch's DistributedDataParallel: each rank has the whole model and a share of the batch.

Gradients are averaged in buckets while the backward pass goes on (Li et al., arXiv 2006.15704). They live in the
buckets (`gradient_as_bucket_view`), so that they exist once.
"""

from __future__ import annotations

import contextlib
import inspect
from contextlib import AbstractContextManager
from typing import Any

import torch
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from llmsys import schema
from llmsys.comm.place import Place
from llmsys.train.engines.local import Local
from llmsys.train.protocols import Fill, Make, filled

NO_BUFFERS: dict[str, Any] = {
    ("forward_sync_buffers" if "forward_sync_buffers" in parameters else "broadcast_buffers"): False
    for parameters in [inspect.signature(DistributedDataParallel).parameters]
}
"""The loop averages batch norms' statistics when they are read; torch 2.13 has renamed the switch."""


class DDP(Local):
    """Also on one rank, which then has a process group of its own."""

    _ddp: DistributedDataParallel

    def __init__(self, config: schema.Config, place: Place, device: torch.device) -> None:
        super().__init__(config, place, device)
        self.divisor = self.world

    def wrap(self, model: nn.Module, make: Make, fill: Fill = filled) -> nn.Module:
        super().wrap(model, make, fill)
        assert isinstance(self.config.engine, schema.DDP)
        self._ddp = DistributedDataParallel(
            model,
            device_ids=[self.device] if self.device.type == "cuda" else None,
            bucket_cap_mb=self.config.engine.bucket_mib,
            gradient_as_bucket_view=True,
            **NO_BUFFERS,
        )
        return self._ddp

    def accumulate(self, last: bool) -> AbstractContextManager[None]:
        return contextlib.nullcontext() if last else self._ddp.no_sync()
