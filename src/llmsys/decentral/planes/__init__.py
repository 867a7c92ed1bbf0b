"""Execution planes: what computes a stage. A graph says what, a plane says with which framework and on which device.

A provider has one plane, and providers of one pipeline may have different ones: between them travel arrays of bytes
(`wire.Array`), whose names and shapes the graph says.
"""

from __future__ import annotations

import hashlib
import importlib
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any, Protocol, Self

from llmsys.decentral.cut import Stage
from llmsys.decentral.graph import Graph, Value
from llmsys.decentral.wire import Array

Arrays = Mapping[str, Array]


@dataclass(frozen=True, kw_only=True)
class AdamW:
    """The optimizer of a job (Loshchilov and Hutter, arXiv 1711.05101); its rate is each step's own, and its weight
    decay that of matrices alone, as in `llmsys.train.optimizer`."""

    beta1: float = 0.9
    beta2: float = 0.999
    eps: float = 1e-8
    weight_decay: float = 0.0


@dataclass(frozen=True, kw_only=True)
class Rules:
    """What all providers of a job keep to: `micro_batches` of a step, whose losses count for as much each, in the order
    of a `schedule`; `seed` of what is drawn. `streams`: nothing is trained, and each micro-batch has variables of its
    own: the keys and values of what it generates."""

    micro_batches: int
    schedule: str = "1f1b"
    optimizer: AdamW = AdamW()
    seed: int = 0
    streams: bool = False

    @classmethod
    def of_json(cls, data: Mapping[str, Any]) -> Self:
        return cls(**{**data, "optimizer": AdamW(**data["optimizer"])})

    def variable(self, key: str, micro_batch: int) -> str:
        """The name in the state of a micro-batch's variable."""
        return f"{VARIABLE}{micro_batch}/{key}" if self.streams else VARIABLE + key

    def draw(self, step: int, micro_batch: int, node: str) -> int:
        """The seed of an operator that draws: it draws the same again, whoever computes it."""
        text = f"{self.seed}/{step}/{micro_batch}/{node}"
        return int.from_bytes(hashlib.blake2b(text.encode(), digest_size=7).digest(), "little")


class Executor(Protocol):
    """A stage. `state` has the parameters it owns and reads, by their key behind `p/`, what the optimizer keeps of
    those it owns, variables and constants (frozen weights among them)."""

    def put(self, state: Arrays) -> None:
        """What of its state has come; ValueError for a name that is not its, or another shape."""

    def begin(self) -> None:
        """What the optimizer keeps, as it is before the first step."""

    @property
    def missing(self) -> set[str]:
        """Names of its state that have not come yet."""

    def state(self, names: Iterable[str]) -> dict[str, Array]: ...

    def forward(self, step: int, micro_batch: int, inputs: Arrays, received: Arrays) -> dict[str, Array]:
        """What goes on, by name."""

    def backward(
        self, micro_batch: int, gradients: Arrays, shared: Arrays
    ) -> tuple[dict[str, Array], dict[str, Array]]:
        """Gradients of what was received, and sums of those of parameters that an earlier stage owns. Its own are kept,
        added up in the order of the calls."""

    def result(self, micro_batch: int) -> float | list[int] | None:
        """A micro-batch's loss, or the tokens that come next, where this stage computes them."""

    def squares(self) -> dict[str, float]:
        """Of each parameter that it owns, the sum of its gradient's squares."""

    def apply(self, rate: float, scale: float) -> None:
        """One step of the optimizer with gradients times `scale`, which are gone then."""

    def forget(self) -> None:
        """Everything of the step under way."""


class Plane(Protocol):
    name: str

    @property
    def stack(self) -> str:
        """Two that say the same compute the same bits. Empty: it cannot say."""

    def stage(self, graph: Graph, stage: Stage, given: Arrays, rules: Rules) -> Executor:
        """`given`: what the job's owner has exported for this plane. ValueError where the plane cannot run an operator
        of it."""

    def warm(self) -> None:
        """What is slow the first time, done once."""

    def matmul_s(self, rows: int, size: int) -> float:
        """Seconds of a product [rows, size] by [size, size] in fp32, at best."""


PARAMETER, MOMENTS, VARIABLE, CONSTANT = "p/", ("m/", "v/", "t/"), "b/", "c/"


def names_of(stage: Stage, rules: Rules) -> list[str]:
    """Of a stage's state: parameters; of those it owns first and second moments and the number of steps; variables;
    constants, which stay as they are for the whole job."""
    own = [key for key in stage.parameters if key not in stage.shares]
    return [
        *(PARAMETER + key for key in stage.parameters),
        *(prefix + key for key in own for prefix in MOMENTS),
        *(
            rules.variable(key, at)
            for at in range(rules.micro_batches if rules.streams else 1)
            for key in stage.variables
        ),
        *(CONSTANT + key for key in stage.constants),
    ]


def key_of(name: str, rules: Rules) -> str:
    """Of a part of the state, by which the graph knows it."""
    return name[2:].partition("/")[2] if rules.streams and name.startswith(VARIABLE) else name[2:]


def value_of(graph: Graph, name: str, rules: Rules) -> Value:
    """What a part of the state is, by its name. KeyError for one that the graph does not have."""
    prefix, key = name[:2], key_of(name, rules)
    if prefix == MOMENTS[-1]:
        return Value(dtype="float32", shape=(), strides=())
    kinds = {VARIABLE: graph.variables, CONSTANT: graph.constants}
    return kinds.get(prefix, graph.parameters)[key]


PLANES = {
    "torch": "llmsys.decentral.planes.torch_stage:TorchPlane",
    "torch_compiled": "llmsys.decentral.planes.torch_compiled:CompiledPlane",
    "onnx": "llmsys.decentral.planes.onnx:OnnxPlane",
}
"""By name; a plane's framework is imported where it is used."""
EXPORTERS = {"onnx": "llmsys.decentral.planes.onnx_export:exported"}
"""Planes that are sent a stage as their framework's own program: function (graph, stage, rules) -> arrays by name, for
who has the job."""


def plane_of(name: str, device: str = "cpu") -> Plane:
    """ValueError for a name that is none, or whose framework is not installed here, or has no such device."""
    if name not in PLANES:
        raise ValueError(f"plane={name}: must be one of {', '.join(PLANES)}")
    module, _, cls = PLANES[name].partition(":")
    try:
        made: Plane = getattr(importlib.import_module(module), cls)(device)
    except ImportError as error:
        raise ValueError(f"plane={name}: needs {error.name}, which is not installed here") from None
    return made
