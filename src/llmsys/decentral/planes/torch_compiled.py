"""A stage on torch, compiled: forward and backward of `planes.joint`, each made one program by `torch.compile`.

It needs what inductor needs (on a CPU a C++ compiler), compiles when a stage's first micro-batch comes, which takes
some ten seconds, and has gradients within float32's rounding of eager torch's, never its bits.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping

import torch
from torch import Tensor

from llmsys.decentral.cut import Stage
from llmsys.decentral.graph import Graph, Value
from llmsys.decentral.planes import Arrays, Rules
from llmsys.decentral.planes.joint import (
    BACK,
    CONSTANT,
    FROM,
    GRADIENT,
    INPUT,
    KEPT,
    PARAMETER,
    RECEIVED,
    RESULT,
    SENT,
    SHARED,
    VARIABLE,
    Function,
    functions,
    under,
)
from llmsys.decentral.planes.torch import Run
from llmsys.decentral.planes.torch_stage import TorchPlane, TorchStage


class CompiledPlane(TorchPlane):
    name = "torch_compiled"
    stack = ""

    def stage(self, graph: Graph, stage: Stage, given: Arrays, rules: Rules) -> CompiledStage:
        return CompiledStage(graph, stage, given, rules, self.device)


class CompiledStage(TorchStage):
    """ValueError for a stage that draws random numbers."""

    def __init__(self, graph: Graph, stage: Stage, given: Arrays, rules: Rules, device: torch.device) -> None:
        super().__init__(graph, stage, given, rules, device)
        self._functions = tuple(Compiled(each) for each in functions(graph, stage, rules, device))

    def _run(self, step: int, micro_batch: int) -> Run:
        return CompiledRun(self.graph, self.own, self._tensors(micro_batch), self._functions, self.device)


class Compiled:
    """A `planes.joint.Function` whose arguments are laid out as it was traced."""

    def __init__(self, function: Function) -> None:
        self.function = function
        self._call: Callable[..., list[Tensor]] = torch.compile(function.module)

    def __call__(self, given: Mapping[str, Tensor]) -> dict[str, Tensor]:
        with torch.no_grad():
            found = self._call(*(_laid_out(given[name], self.function.values[name]) for name in self.function.takes))
        return dict(zip(self.function.gives, found, strict=True))


def _laid_out(tensor: Tensor, value: Value) -> Tensor:
    """As it was traced: a compiled forward pass may give what it keeps in another order, of which backward makes views
    that are none."""
    tensor = tensor.detach()
    if tuple(tensor.stride()) == value.strides:
        return tensor
    return tensor.new_empty_strided(value.shape, value.strides).copy_(tensor)


class CompiledRun(Run):
    """See `planes.torch.Run`."""

    def __init__(
        self,
        graph: Graph,
        stage: Stage,
        tensors: Mapping[str, Tensor],
        functions: tuple[Compiled, ...],
        device: torch.device,
    ) -> None:
        super().__init__(graph, stage, tensors, train=False)
        self.device = device
        self._forward, self._backward = functions
        self._given: dict[str, Tensor] = {}
        self._found: dict[str, Tensor] = {}

    def forward(self, inputs: Mapping[str, Tensor], received: Mapping[str, Tensor]) -> dict[str, Tensor]:
        kinds = {PARAMETER: self.stage.parameters, VARIABLE: self.stage.variables, CONSTANT: self.stage.constants}
        given = {kind + key: self.tensors[key] for kind, keys in kinds.items() for key in keys}
        given |= {INPUT + name: inputs[name] for name in self.stage.inputs}
        given |= {RECEIVED + name: received[name] for name in self.stage.receives}
        found = self._forward(given)
        self._given = given | {name: each for name, each in found.items() if name.startswith(KEPT)}
        self._found = {name: each for name, each in found.items() if not name.startswith(KEPT)}
        return under(found, SENT)

    @property
    def outputs(self) -> dict[str, Tensor]:
        return {name: self._found[RESULT] for name in self.graph.outputs if RESULT in self._found}

    @property
    def updates(self) -> dict[str, Tensor]:
        return under(self._found, VARIABLE)

    def backward(
        self, gradients: Mapping[str, Tensor], shared: Mapping[str, Tensor]
    ) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
        given = self._given | {FROM + name: each for name, each in gradients.items()}
        given |= {SHARED + key: each for key, each in shared.items()}
        for name in set(self._backward.function.takes) - set(given):  # nothing depends on it
            value = self._backward.function.values[name]
            given[name] = torch.zeros(value.shape, dtype=getattr(torch, value.dtype), device=self.device)
        found = self._backward(given)
        return under(found, BACK), under(found, GRADIENT)
