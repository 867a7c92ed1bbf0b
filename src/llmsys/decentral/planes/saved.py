"""What each operator keeps for the backward pass, found out without computing anything: autograd is asked, on tensors
that have shapes and no elements."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from llmsys.decentral.cut import contiguous, cut
from llmsys.decentral.graph import Graph, Node, Value
from llmsys.decentral.planes.torch import Run


def saved(graph: Graph) -> dict[str, int]:
    """Bytes by operator's name, those of 0 left out. A storage counts once, with the operator that is first to keep it;
    storages of parameters, constants and variables do not."""
    from torch._subclasses.fake_tensor import FakeTensorMode

    (stage,) = cut(graph, contiguous(graph, []))
    with FakeTensorMode():
        own = {**graph.parameters, **graph.constants, **graph.variables}
        run = _Kept(graph, stage, {key: _empty(value) for key, value in own.items()})
        with torch.autograd.graph.saved_tensors_hooks(run.keep, lambda tensor: tensor):
            run.forward({node.name: _empty(node.values[0]) for node in graph.nodes if node.kind == "placeholder"}, {})
    return run.found


class _Kept(Run):
    """A run that notes what is kept while an operator is called."""

    def __init__(self, *given: Any) -> None:
        super().__init__(*given)
        self.found: dict[str, int] = {}
        self._now = ""
        self._seen = {each.untyped_storage()._cdata: each for each in self.tensors.values()}

    def keep(self, tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage._cdata not in self._seen:
            self._seen[storage._cdata] = tensor  # held, or its address could be another's
            self.found[self._now] = self.found.get(self._now, 0) + storage.nbytes()
        return tensor

    def _result(self, node: Node, device: torch.device) -> Any:
        self._now = node.name
        return super()._result(node, device)


def _empty(value: Value) -> Tensor:
    return torch.empty_strided(value.shape, value.strides, dtype=getattr(torch, value.dtype))
