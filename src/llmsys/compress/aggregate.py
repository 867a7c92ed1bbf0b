"""Gradient compression of a list of gradients, for plain loops, DeepSpeed's ZeRO 0 and 1 and FSDP2's replicate axis.

    aggregator = Aggregator(model.named_parameters(), CompressConfig(method="acpsgd", r=4))
    loss.backward()
    aggregator.aggregate([p.grad for p in model.parameters()])

All buckets' exchanges are under way together, but after the backward pass: under DDP `hook` hides them behind it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence

import torch
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
        self.names = [name for name, _ in named]
        if not named:
            raise ValueError("compress: no parameters to exchange the gradients of")
        check_equal({**self.described(), "bucket_mib": str(bucket_mib)}, group, named[0][1].device)
        self.buckets: list[list[int]] = []
        for dtype in dict.fromkeys(tensor.dtype for _, tensor in named):
            alike = [i for i, (_, tensor) in enumerate(named) if tensor.dtype == dtype]
            sizes = [named[i][1].numel() * named[i][1].element_size() for i in alike]
            self.buckets += [[alike[i] for i in bucket] for bucket in buckets(sizes, int(bucket_mib * MIB))]

    def aggregate(self, grads: Sequence[Tensor]) -> Sequence[Tensor]:
        """Makes each of `grads`, in the order of the parameters, their compressed mean over the ranks, in place, and
        returns them. Collective. Takes one more copy of the gradients while it works."""
        if [grad.shape for grad in grads] != list(self.shapes.values()):
            raise ValueError("compress: gradients are not of the shapes of the parameters, in their order")
        self.begin()
        flats, transfers = [], []
        for bucket in self.buckets:
            flat = _flatten([grads[i] for i in bucket])
            views = flat.split([grads[i].numel() for i in bucket])
            shaped = [view.view(grads[i].shape) for i, view in zip(bucket, views, strict=True)]
            transfers.append(self.start([self.names[i] for i in bucket], shaped, flat))
            flats.append(shaped)
        self.advance()
        for index in finish(transfers):
            self.end(transfers[index])
            for i, view in zip(self.buckets[index], flats[index], strict=True):
                grads[i].copy_(view)
        self._settle()  # now, as what it could put back holds on to the copy of the gradients
        return grads


def _flatten(tensors: Sequence[Tensor]) -> Tensor:
    return torch.cat([tensor.detach().reshape(-1) for tensor in tensors])
