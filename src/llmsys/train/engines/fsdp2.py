"""torch's fully_shard (FSDP2): every parameter is cut along its first dimension over the ranks.

A block's weights are gathered when its forward or backward pass begins and freed when it ends; its gradients are
reduced and scattered, so that each rank has, and updates, its own piece (Zhao et al., arXiv 2304.11277; ZeRO-3 of
arXiv 1910.02054 on DTensors).
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from contextlib import AbstractContextManager
from typing import Any

import torch
from torch import Tensor, nn

from llmsys import schema
from llmsys.comm import collectives
from llmsys.comm.place import Place
from llmsys.train.engines.local import Local
from llmsys.train.protocols import Fill, Make, filled


class FSDP2(Local):
    """One `fully_shard` for each block and one for the rest."""

    cuts_weights = True
    _root: Any

    def __init__(self, config: schema.Config, place: Place, device: torch.device) -> None:
        super().__init__(config, place, device)
        self.divisor = self.world

    def wrap(self, model: nn.Module, make: Make, fill: Fill = filled) -> nn.Module:
        from torch.distributed.device_mesh import init_device_mesh
        from torch.distributed.fsdp import fully_shard

        from llmsys.models.surgery import blocks

        assert isinstance(self.config.engine, schema.FSDP2)
        mesh = init_device_mesh(self.device.type, (self.world,))
        for _, block in blocks(model):
            fill(block)
            fully_shard(block, mesh=mesh, reshard_after_forward=self.config.engine.reshard)
        fill(model)
        self._root = fully_shard(model, mesh=mesh, reshard_after_forward=self.config.engine.reshard)
        return super().wrap(model, make)

    def accumulate(self, last: bool) -> AbstractContextManager[None]:
        return self._synchronised(last)

    @contextlib.contextmanager
    def _synchronised(self, last: bool) -> Iterator[None]:
        self._root.set_requires_gradient_sync(last)
        yield

    def settle(self) -> None:
        """Without resharding the last forward pass, an evaluation's say, has left gathered weights in the modules."""
        from torch.distributed.fsdp import FSDPModule

        for module in self.model.modules():
            if isinstance(module, FSDPModule):
                module.reshard()

    def norm(self, gradients: list[Tensor]) -> Tensor:
        squares = nn.utils.get_total_norm(gradients).double() ** 2
        collectives.all_reduce(squares)
        return squares.sqrt()
