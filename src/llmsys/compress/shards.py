"""Gradient compression between the replicas of a model that FSDP2 shards within each of them.

    mesh = init_device_mesh("cuda", (2, 4), mesh_dim_names=("replicate", "shard"))
    fully_shard(model, mesh=mesh["shard"])          # FSDP2 averages over the ranks of a replica
    replicas = ShardAggregator(model, CompressConfig(r=4), group=mesh["replicate"].get_group())
    loss.backward()
    replicas.exchange()                             # and this over the replicas, in place of HSDP's all-reduce

The shard axis is fast (NVLink), the replicate axis the network: only what crosses that is compressed. A rank has the
same rows of each matrix as its peers in the other replicas, and that shard [N / S, M] is the matrix which is
compressed: it has r directions of its own, and min(N / S, M) says whether it is worth it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING

import torch
import torch.distributed as dist
from torch import Tensor, nn

from llmsys.compress.aggregate import Aggregator
from llmsys.compress.config import CompressConfig
from llmsys.compress.transfer import Group

if TYPE_CHECKING:
    from torch.distributed.tensor import DTensor


class ShardAggregator(Aggregator):
    """Exchanges, over `group`, the gradients of `model`'s parameters, which are DTensors on a mesh of one dimension.

    `group`: the ranks that have the same shard, one of each replica. `shard`: which one this is. What is kept is saved
    by shard, as the ranks of one group: `save_state(replicas, f"checkpoint/shard-{replicas.shard}")`; it can be read
    on another number of replicas of as many shards.
    """

    def __init__(
        self,
        model: nn.Module,
        config: CompressConfig,
        *,
        group: Group,
        bucket_mib: float = 25.0,
        loss_scale: Callable[[], float] | None = None,
    ) -> None:
        """Collective. ValueError on every rank where configs or models differ, for parameters that are not sharded
        over one dimension, and where `group` has two ranks of one replica."""
        self._sharded = {name.replace("_orig_mod.", ""): p for name, p in _sharded(model)}
        if not self._sharded:
            raise ValueError("compress: no parameters to exchange the gradients of")
        mesh = next(iter(self._sharded.values())).device_mesh
        self._shards = mesh.get_group()
        self.shard: int = mesh.get_local_rank()
        shared = set(dist.get_process_group_ranks(group)) & set(dist.get_process_group_ranks(self._shards))
        if len(shared) > 1:
            raise ValueError(f'group: ranks {sorted(shared)} are of one replica; give mesh["replicate"].get_group()')
        local = [(name, p.to_local()) for name, p in self._sharded.items()]
        super().__init__(local, config, group=group, bucket_mib=bucket_mib, loss_scale=loss_scale)

    @torch.no_grad()
    def exchange(self) -> None:
        """Makes the model's gradients, in place, their compressed mean over the replicas. Collective; once a step,
        after the backward pass of its last micro-batch. A parameter that no loss has reached gets a gradient of zero,
        plus what was kept of earlier ones."""
        grads = []
        for p in self._sharded.values():
            if p.grad is None:
                p.grad = torch.zeros_like(p)
            grads.append(p.grad.to_local())  # type: ignore[attr-defined]
        self.aggregate(grads)

    def left_out(self) -> bool:
        """All ranks leave out a step of which one shard is not finite; the others' groups have not heard of it."""
        return self._anywhere(super().left_out())

    def drifted(self) -> bool:
        return self._anywhere(super().drifted())

    def _anywhere(self, mine: bool) -> bool:
        """Whether it is so of one of the shards."""
        if dist.get_world_size(self._shards) == 1:
            return mine
        flag = torch.tensor(float(mine), device=next(iter(self.devices.values())))
        dist.all_reduce(flag, dist.ReduceOp.MAX, group=self._shards)
        return bool(flag)


def _sharded(model: nn.Module) -> Iterator[tuple[str, DTensor]]:
    """The trained parameters by name. ValueError for one that is not sharded over one dimension."""
    from torch.distributed.fsdp import FSDPModule
    from torch.distributed.tensor import DTensor

    for module in model.modules():
        if isinstance(module, FSDPModule):
            module.reshard()  # a forward pass without a backward one leaves gathered weights behind
    found: Tensor
    for name, found in model.named_parameters():
        if not found.requires_grad:
            continue
        if not isinstance(found, DTensor):
            raise ValueError(f'{name}: not sharded; make it part of a fully_shard(..., mesh=mesh["shard"])')
        if found.device_mesh.ndim != 1:
            what = f"sharded over the dimensions {found.device_mesh.mesh_dim_names}, of which FSDP2 averages over all"
            raise ValueError(f'{name}: {what}; use fully_shard(..., mesh=mesh["shard"])')
        yield name, found
