"""A stage on ONNX Runtime, whose provider needs no torch: models that the job's owner has exported
(`planes.onnx_export`), forward and backward, and AdamW in numpy.

Gradients are torch's within float32's rounding, never bit for bit: kernels add in another order.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterable, Mapping
from typing import Any

import numpy as np
import onnxruntime

from llmsys.decentral.cut import Stage
from llmsys.decentral.graph import Graph, Value
from llmsys.decentral.measure import best_s
from llmsys.decentral.planes import CONSTANT, MOMENTS, PARAMETER, VARIABLE, Arrays, Rules, names_of, value_of
from llmsys.decentral.wire import Array

Numbers = np.ndarray[Any, Any]
FIRST, SECOND, STEPS = MOMENTS
WARNINGS = 3
"""Above what onnxruntime says of a model: that it could be smaller."""


def array_of(found: Numbers) -> Array:
    """As it travels, row by row."""
    order = tuple(range(found.ndim))
    data = np.ascontiguousarray(found).tobytes()
    return Array(dtype=str(found.dtype), shape=found.shape, order=order, expanded=(False,) * found.ndim, data=data)


def numbers_of(array: Array) -> Numbers:
    """ValueError for a dtype that numpy does not have."""
    if array.dtype == "bfloat16":
        raise ValueError("a tensor of bfloat16: the onnx plane has none")
    flat = np.frombuffer(array.data, dtype=np.dtype(array.dtype)).reshape(array.sent_shape)
    return np.broadcast_to(flat.transpose(np.argsort(array.order)), array.shape)


class Function:
    """A model, its arguments and results by name."""

    def __init__(self, model: bytes, names: Mapping[str, list[str]]) -> None:
        options = onnxruntime.SessionOptions()
        options.log_severity_level = WARNINGS
        options.intra_op_num_threads = int(os.environ.get("OMP_NUM_THREADS", "0"))
        try:
            self._session = onnxruntime.InferenceSession(model, options, providers=["CPUExecutionProvider"])
        except Exception as error:  # noqa: BLE001  its kinds are those of C++
            raise ValueError(f"onnx: {type(error).__name__}: {error}") from None
        self.takes, self.gives = tuple(names["takes"]), tuple(names["gives"])
        self._names = [each.name for each in self._session.get_inputs()]
        if (len(self._names), len(self._session.get_outputs())) != (len(self.takes), len(self.gives)):
            raise ValueError("onnx: a model with other arguments than it is said to have")

    def __call__(self, given: Mapping[str, Numbers]) -> dict[str, Numbers]:
        own = {name: np.ascontiguousarray(given[key]) for name, key in zip(self._names, self.takes, strict=True)}
        return dict(zip(self.gives, self._session.run(None, own), strict=True))


class OnnxPlane:
    name = "onnx"
    stack = ""

    def __init__(self, device: str = "cpu") -> None:
        """ValueError for a device that is not the CPU."""
        if device != "cpu":
            raise ValueError(f"device={device}: the onnx plane computes on the CPU")

    def stage(self, graph: Graph, stage: Stage, given: Arrays, rules: Rules) -> OnnxStage:
        return OnnxStage(graph, stage, given, rules)

    def warm(self) -> None:
        """Importing it was."""

    def matmul_s(self, rows: int, size: int) -> float:
        """By numpy, whose BLAS is about as fast as ONNX Runtime's own product."""
        left, right = np.ones((rows, size), np.float32), np.ones((size, size), np.float32)
        return best_s(lambda: left @ right)


class OnnxStage:
    """See `planes.Executor`."""

    def __init__(self, graph: Graph, stage: Stage, given: Arrays, rules: Rules) -> None:
        self.graph, self.own, self.rules = graph, stage, rules
        self.names = frozenset(names_of(stage, rules))
        self._held: dict[str, Numbers] = {}
        names = json.loads(given["names"].data)
        self._functions = {what: Function(given[what].data, each) for what, each in names.items()}
        self._kept: dict[int, dict[str, Numbers]] = {}
        self._results: dict[int, float | list[int]] = {}
        self._gradients: dict[str, Numbers] = {}
        self._changed: dict[str, Numbers] = {}

    # --- its state ---

    def put(self, state: Arrays) -> None:
        for name, array in state.items():
            if name not in self.names:
                raise ValueError(f"state {name}: is none of this stage's")
            self._held[name] = _checked(name, array, value_of(self.graph, name, self.rules)).copy()

    def begin(self) -> None:
        for name in self.missing:
            if name.startswith(MOMENTS):
                value = value_of(self.graph, name, self.rules)
                self._held[name] = np.zeros(value.shape, np.dtype(value.dtype))

    @property
    def missing(self) -> set[str]:
        return set(self.names) - set(self._held)

    def state(self, names: Iterable[str]) -> dict[str, Array]:
        return {name: array_of(self._held[name]) for name in names}

    # --- a step ---

    def forward(self, step: int, micro_batch: int, inputs: Arrays, received: Arrays) -> dict[str, Array]:
        given = {**self._tensors(micro_batch), **_under("in/", inputs), **_under("got/", received)}
        found = self._functions["forward"](given)
        if not self.rules.streams:  # else nothing goes back
            self._kept[micro_batch] = {name: given[name] for name in self._functions["backward"].takes if name in given}
            self._kept[micro_batch] |= {name: each for name, each in found.items() if name.startswith("kept/")}
        changed = {name[2:]: each for name, each in found.items() if name.startswith(VARIABLE)}
        self._changed |= {self.rules.variable(key, micro_batch): each for key, each in changed.items()}
        if "result" in found:
            value = found["result"]
            self._results[micro_batch] = value.flatten().tolist() if self.rules.streams else float(value)
        return {name[5:]: array_of(each) for name, each in found.items() if name.startswith("sent/")}

    def backward(
        self, micro_batch: int, gradients: Arrays, shared: Arrays
    ) -> tuple[dict[str, Array], dict[str, Array]]:
        given = {**self._kept.pop(micro_batch), **_under("from/", gradients), **_under("shared/", shared)}
        backward = self._functions["backward"]
        for name in backward.takes:
            if name not in given:  # nothing depends on it
                kind, _, key = name.partition("/")
                value = self.graph.by_name[key].values[0] if kind == "from" else self.graph.parameters[key]
                given[name] = np.zeros(value.shape, np.dtype(value.dtype))
        found = backward(given)
        on = {}
        for name in (each for each in found if each.startswith("grad/")):
            key = name[5:]
            if key in self.own.shares:
                on[key] = array_of(found[name])
            elif key in self._gradients:
                self._gradients[key] = self._gradients[key] + found[name]
            else:
                self._gradients[key] = found[name]
        return {name[5:]: array_of(each) for name, each in found.items() if name.startswith("back/")}, on

    def result(self, micro_batch: int) -> float | list[int] | None:
        return self._results.get(micro_batch)

    def squares(self) -> dict[str, float]:
        return {key: float(np.square(each, dtype=np.float64).sum()) for key, each in self._gradients.items()}

    def apply(self, rate: float, scale: float) -> None:
        """As torch's AdamW does, in its order."""
        chosen = self.rules.optimizer
        for key, gradient in self._gradients.items():
            one = np.float32
            steps = self._held[STEPS + key] + one(1)
            parameter, first, second = (self._held[prefix + key] for prefix in (PARAMETER, FIRST, SECOND))
            gradient = gradient * one(scale) if scale != 1.0 else gradient
            if parameter.ndim >= 2:
                parameter = parameter * one(1 - rate * chosen.weight_decay)
            first = first + (gradient - first) * one(1 - chosen.beta1)
            second = second * one(chosen.beta2) + gradient * gradient * one(1 - chosen.beta2)
            size = rate / (1 - chosen.beta1 ** float(steps))
            below = np.sqrt(second) / one((1 - chosen.beta2 ** float(steps)) ** 0.5) + one(chosen.eps)
            parameter = parameter - one(size) * (first / below)
            held = {PARAMETER: parameter, FIRST: first, SECOND: second, STEPS: np.asarray(steps, one)}
            self._held |= {prefix + key: each for prefix, each in held.items()}
        self._held |= self._changed
        self.forget()

    def forget(self) -> None:
        self._kept.clear()
        self._results.clear()
        self._gradients.clear()
        self._changed.clear()

    def _tensors(self, micro_batch: int) -> dict[str, Numbers]:
        now = {**self._held, **self._changed}
        found = {PARAMETER + key: now[PARAMETER + key] for key in self.own.parameters}
        found |= {CONSTANT + key: now[CONSTANT + key] for key in self.own.constants}
        return found | {VARIABLE + key: now[self.rules.variable(key, micro_batch)] for key in self.own.variables}


def _under(prefix: str, arrays: Arrays) -> dict[str, Numbers]:
    return {prefix + name: numbers_of(each) for name, each in arrays.items()}


def _checked(what: str, array: Array, value: Value) -> Numbers:
    if (array.dtype, array.shape) != (value.dtype, value.shape):
        said = f"{array.dtype} {list(array.shape)}"
        raise ValueError(f"{what}: is {said}, and in the graph {value.dtype} {list(value.shape)}")
    return numbers_of(array)
