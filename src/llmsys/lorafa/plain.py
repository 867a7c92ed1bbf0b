"""Adapters as plain operators, of which a graph can be made (`torch.export`).

LoRA-FA's own functions (`pieces`) are Python, which an exporter cannot look into. In a graph a frozen A is a constant:
of x in x A^T autograd keeps nothing, so that there too the full-rank input of an adapted layer is not stored.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

import torch.nn.functional as F
from torch import Tensor, nn

from llmsys.lorafa.layer import AdaptedLinear
from llmsys.lorafa.targets import adapted


@contextlib.contextmanager
def traceable(model: nn.Module) -> Iterator[None]:
    """Within it adapted layers of `model` are plain ones, with the same tensors. ValueError for an adapter whose
    gradient is corrected, which autograd knows nothing of, and for one that a graph would not have."""
    before = [(layer, type(layer)) for _, layer in adapted(model)]
    for layer, cls in before:
        own = layer.adapter
        if own is None or own.inverse is not None:
            what = "none, or one that is merged" if own is None else f"correction={own.config.correction}"
            raise ValueError(f"adapter: {what}: a traced graph has no such thing")
        layer.__class__ = type(cls.__name__, (cls,), {"forward": _forward})
    try:
        yield
    finally:
        for layer, cls in before:
            layer.__class__ = cls


def _forward(self: AdaptedLinear, x: Tensor) -> Tensor:
    """x W^T + bias + s (x A^T) B^T, [..., N] -> [..., M]."""
    own = self.adapter
    assert own is not None
    bias = self.bias if own.bias is None else own.bias
    dropped = F.dropout(x, own.dropout, self.training) if own.dropout else x
    return F.linear(x, self.weight, bias) + own.scale * F.linear(F.linear(dropped, own.a), own.b)
