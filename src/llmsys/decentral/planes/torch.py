"""Stages by torch: each operator is torch's own, called by its name; derivatives are autograd's.

`Run` is one micro-batch on one stage: `forward` gives what goes on, `backward` what goes back. Bits are those of the
uncut model in one process with as many threads, for three reasons: operators and their order are the same; a tensor
arrives with the strides that it left with (`planes.layout`), so that kernels choose alike; and gradients of a tensor or
a parameter that several stages read are added from the last reader to the first, as autograd does, by handing the sum
so far to the earlier stage's backward pass as one more root.
"""

from __future__ import annotations

import operator
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor

from llmsys.decentral.cut import Stage
from llmsys.decentral.graph import ITEM, Graph, Node


class Run:
    """One micro-batch of `stage`. `tensors`: its parameters, constants and variables by key; parameters are left as
    they are, and gradients are returned, not stored: of the loss times `share`. `draw`: the seed of an operator that
    draws random numbers, by its name; None: it goes on with the process' own."""

    def __init__(
        self,
        graph: Graph,
        stage: Stage,
        tensors: Mapping[str, Tensor],
        *,
        train: bool = True,
        share: float = 1.0,
        draw: Callable[[str], int] | None = None,
    ) -> None:
        self.graph, self.stage, self.train, self.share, self.draw = graph, stage, train, share, draw
        self.tensors = dict(tensors)
        if train:
            for key in stage.parameters:
                if tensors[key].is_floating_point():
                    self.tensors[key] = tensors[key].detach().requires_grad_()
        self._values: dict[str, Any] = {}
        self._received: dict[str, Tensor] = {}

    def forward(self, inputs: Mapping[str, Tensor], received: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """What goes on, by name. `inputs`: its placeholders; `received`: what came from stages before it. KeyError for
        one that is missing."""
        values = self._values
        values.update({name: inputs[name] for name in self.stage.inputs})
        for name in self.stage.receives:
            tensor = received[name].detach()
            if self.train and name in self.stage.trained:
                tensor.requires_grad_()
            self._received[name] = values[name] = tensor
        here = next(iter([*self.tensors.values(), *received.values(), *inputs.values()]), None)
        device = torch.device("cpu") if here is None else here.device
        with torch.set_grad_enabled(self.train):
            for name in self.stage.nodes:
                values[name] = self._result(self.graph.by_name[name], device)
        return {name: values[name].detach() for name in self.stage.sends}

    @property
    def outputs(self) -> dict[str, Tensor]:
        """What the job itself returns, and this stage computes: the loss, or logits."""
        return {name: self._values[name].detach() for name in self.graph.outputs if name in self.stage.nodes}

    @property
    def updates(self) -> dict[str, Tensor]:
        """The next state of variables, by key."""
        return {
            key: self._values[name].detach() for key, name in self.graph.updates.items() if name in self.stage.nodes
        }

    def backward(
        self, gradients: Mapping[str, Tensor], shared: Mapping[str, Tensor]
    ) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
        """(gradients of what was received, gradients of parameters), by name and key; what nothing depends on has none.

        `gradients` of what was sent, from the stages that it went to; `shared`: of parameters, the sums so far of
        later stages that read them too."""
        roots: list[tuple[Tensor, Tensor | None]] = []
        loss = self.graph.loss
        if loss in self.stage.nodes:
            value = self._values[str(loss)]
            roots.append((value, torch.full_like(value, self.share)))
        roots += [(self._values[name], gradients[name]) for name in self.stage.sends if name in gradients]
        roots += [(self.tensors[key], shared[key]) for key in self.stage.parameters if key in shared]
        roots = [(tensor, gradient) for tensor, gradient in roots if tensor.requires_grad]
        wanted = {name: tensor for name, tensor in self._received.items() if tensor.requires_grad}
        own = {key: self.tensors[key] for key in self.stage.parameters if self.tensors[key].requires_grad}
        if not roots or not (wanted or own):
            return {}, {}
        found = torch.autograd.grad(
            [tensor for tensor, _ in roots],
            [*wanted.values(), *own.values()],
            [gradient for _, gradient in roots],
            allow_unused=True,
        )
        back = dict(zip([*wanted], found, strict=False))
        updated = dict(zip([*own], found[len(wanted) :], strict=True))
        self._values.clear()
        return (
            {name: each for name, each in back.items() if each is not None},
            {key: each for key, each in updated.items() if each is not None},
        )

    def _result(self, node: Node, device: torch.device) -> Any:
        if node.random and self.draw is not None:
            torch.manual_seed(self.draw(node.name))
        args = [self._live(each, device) for each in node.args]
        kwargs = {key: self._live(each, device) for key, each in node.kwargs.items()}
        return operation(node.target)(*args, **kwargs)

    def _live(self, value: Any, device: torch.device) -> Any:
        """An argument as the operator takes it."""
        if isinstance(value, Mapping):
            ((kind, name),) = value.items()
            if kind == "node":
                return self._values[name]
            if kind == "tensor":
                return self.tensors[name]
            if kind == "device":
                return device
            return float(name) if kind == "float" else constant(kind, name)
        if isinstance(value, (tuple, list)):
            return [self._live(each, device) for each in value]
        return value


CONSTANTS = {"dtype": torch.dtype, "layout": torch.layout, "memory_format": torch.memory_format}


def constant(kind: str, name: str) -> Any:
    """`torch.<name>`, where that is of `kind`. ValueError for anything else."""
    found = getattr(torch, name, None)
    if kind not in CONSTANTS or not isinstance(found, CONSTANTS[kind]):
        raise ValueError(f"{kind} {name}: torch has none of that name")
    return found


def operation(target: str) -> Any:
    """The operator of a name. ValueError for what is none of torch's own, or is none in this version."""
    if target == ITEM:
        return operator.getitem
    space, _, name = target.partition(".")
    packet, _, overload = name.partition(".")
    if space != "aten" or not packet.isidentifier() or not overload.isidentifier():
        raise ValueError(f"operator {target}: must be one of torch's own (aten)")
    found = getattr(getattr(torch.ops.aten, packet, None), overload, None)
    if found is None:
        raise ValueError(f"operator {target}: is not in torch {torch.__version__}")
    return found
