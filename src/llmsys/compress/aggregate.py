"""Gradient compression of a list of gradients, for plain loops, DeepSpeed's ZeRO 0 and 1 and FSDP2's replicate axis.

    named = [(name, p) for name, p in model.named_parameters() if p.requires_grad]
    aggregator = Aggregator(named, CompressConfig(method="acpsgd", r=4))
    loss.backward()
    for (_, p), mean in zip(named, aggregator.aggregate([p.grad for _, p in named])):
        p.grad = mean                                   # itself; where there was none there is one now

All buckets' exchanges are under way together, but after the backward pass: under DDP `hook` hides them behind it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence

import torch
import torch.distributed as dist
from torch import Tensor

from llmsys.comm.buckets import buckets
from llmsys.compress.agreement import check_equal
from llmsys.compress.config import CompressConfig
from llmsys.compress.state import CompressionState
from llmsys.compress.transfer import Group, finish

MIB = 2**20


class Aggregator(CompressionState):
    """Exchanges the gradients of `parameters` (name, tensor), on one device, over `group`."""

    def __init__(
        self,
        parameters: Iterable[tuple[str, Tensor]],
        config: CompressConfig,
        *,
        group: Group = None,
        bucket_mib: float = 25.0,
        loss_scale: Callable[[], float] | None = None,
    ) -> None:
        """Collective. ValueError on every rank where configs, parameters or `bucket_mib` differ."""
        named = list(parameters)
        if any(isinstance(each, Tensor) for each in named):
            raise ValueError("compress: parameters without their names; give model.named_parameters()")
        super().__init__(config, named, group=group, loss_scale=loss_scale)
        self.names = list(self.shapes)
        wrong = "" if named else "compress: no parameters to exchange the gradients of"
        device = named[0][1].device if named else _device(group)
        check_equal({**self.described(), "bucket_mib": str(bucket_mib)}, group, device, wrong)
        self.buckets: list[list[int]] = []
        for dtype in dict.fromkeys(tensor.dtype for _, tensor in named):
            alike = [i for i, (_, tensor) in enumerate(named) if tensor.dtype == dtype]
            sizes = [named[i][1].numel() * named[i][1].element_size() for i in alike]
            self.buckets += [[alike[i] for i in bucket] for bucket in buckets(sizes, int(bucket_mib * MIB))]

    def aggregate(self, grads: Sequence[Tensor | None]) -> list[Tensor]:
        """Makes each of `grads`, in the order of the parameters, their compressed mean over the ranks, in place, and
        returns them. In place of None, a parameter that no loss has reached here, is a new tensor: other ranks may have
        a gradient, and something of earlier ones may be sent, so it has to become the parameter's. Collective.

        Takes one more copy of the gradients while it works, and so undoes a step of which a part is not finite in all
        buckets."""
        found = [self._or_zeros(*each) for each in zip(self.names, grads, strict=False)]
        if len(grads) != len(found) or [grad.shape for grad in found] != list(self.shapes.values()):
            raise ValueError("compress: gradients are not of the shapes of the parameters, in their order")
        self.begin()
        flats, transfers = [], []
        for bucket in self.buckets:
            flat = _flatten([found[i] for i in bucket])
            views = flat.split([found[i].numel() for i in bucket])
            shaped = [view.view(found[i].shape) for i, view in zip(bucket, views, strict=True)]
            transfers.append(self.start([self.names[i] for i in bucket], shaped, flat))
            flats.append(shaped)
        self.advance()
        for index in finish(transfers):
            self.end(transfers[index])
        self._settle(dict(zip(self.names, found, strict=True)))  # now, while they are what they were
        for bucket, shaped in zip(self.buckets, flats, strict=True):
            for i, view in zip(bucket, shaped, strict=True):
                found[i].copy_(view)
        return found

    def _or_zeros(self, name: str, grad: Tensor | None) -> Tensor:
        if grad is None:
            return torch.zeros(self.shapes[name], dtype=self.dtypes[name], device=self.devices[name])
        return grad


def _device(group: Group) -> torch.device:
    """On which the ranks of `group` exchange tensors."""
    return torch.device("cuda" if dist.is_initialized() and "nccl" in dist.get_backend(group) else "cpu")


def _flatten(tensors: Sequence[Tensor]) -> Tensor:
    return torch.cat([tensor.detach().reshape(-1) for tensor in tensors])
