"""Collectives over all ranks of the run, each the identity on one process: what is written with them is tested without
a cluster. Tensors are on the device of the group's backend, contiguous, and of one shape on all ranks.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

Work = Any
"""What an asynchronous collective returns: `wait()` blocks until the result is there."""


class Done:
    """A collective on one process, already over."""

    def wait(self) -> None:
        pass


def world() -> int:
    """How many ranks there are; 1 without a process group."""
    return dist.get_world_size() if dist.is_initialized() else 1


def rank() -> int:
    """This process's rank; 0 without a process group."""
    return dist.get_rank() if dist.is_initialized() else 0


def all_reduce(tensor: Tensor, *, wait: bool = True) -> Work:
    """Makes `tensor`, in place, the sum of all ranks' tensors."""
    if world() == 1:
        return Done()
    work = dist.all_reduce(tensor, async_op=not wait)
    return Done() if wait else work


def all_gather(tensor: Tensor) -> Tensor:
    """The ranks' tensors [...] one after another, [world, ...]; `tensor` is left as it is."""
    if world() == 1:
        return tensor.unsqueeze(0)
    gathered = tensor.new_empty((world(), *tensor.shape))
    dist.all_gather(list(gathered.unbind(0)), tensor)
    return gathered


def reduce_scatter(tensor: Tensor, part: Tensor) -> None:
    """Makes `part` [n], in place, this rank's share of the sum of all ranks' tensors [world n]."""
    if world() == 1:
        part.copy_(tensor)
    elif hasattr(dist, "reduce_scatter_single"):  # as torch 2.13 calls it
        dist.reduce_scatter_single(part, tensor)
    else:
        dist.reduce_scatter_tensor(part, tensor)


def broadcast(tensor: Tensor, source: int = 0) -> None:
    """Makes `tensor`, in place, that of rank `source`."""
    if world() > 1:
        dist.broadcast(tensor, source)


def agree(value: int, device: torch.device, source: int = 0) -> int:
    """The integer of rank `source`, on every rank."""
    tensor = torch.tensor([value], dtype=torch.int64, device=device)
    broadcast(tensor, source)
    return int(tensor.item())


def most(value: int, device: torch.device) -> int:
    """The greatest of the ranks' integers."""
    tensor = torch.tensor([value], dtype=torch.int64, device=device)
    if world() > 1:
        dist.all_reduce(tensor, dist.ReduceOp.MAX)
    return int(tensor.item())
