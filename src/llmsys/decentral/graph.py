"""A model as a graph of operators: what is computed, by names, shapes and constants alone.

    placeholder   an input of the job: tokens, labels, images
    variable      state that a step reads and leaves behind changed: a cache of keys and values, a running mean
    parametric    an operator that reads a parameter; its Update belongs to the optimizer
    operator      any other
    loss          the scalar that the backward pass begins at

These are FusionAI's kinds as far as its abstract tells them (arXiv 2309.01172), rebuilt and not quoted. An operator's
arguments are plain JSON in which `{"node": name}` stands for what another node gave, and `{"tensor": key}` for a
parameter, a constant or a variable: so a graph is read on a machine that has never seen the model, and nothing in it
can be run but operators by name.

Parameters are keyed by their storage: two names of one tensor are one key, so tied embeddings stay tied.
"""

from __future__ import annotations

import functools
import math
import re
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass, field
from typing import Any, Self

KINDS = ("placeholder", "variable", "parametric", "operator", "loss")
VERSION = 1
ITEM = "getitem"
"""One of the results of an operator that has several."""
_INDEXED = re.compile(r"^(.*?\.\d+)(?:\.|$)")


@dataclass(frozen=True, kw_only=True)
class Value:
    """What a tensor is: `strides` in elements, as it was traced."""

    dtype: str
    shape: tuple[int, ...]
    strides: tuple[int, ...]

    @property
    def nbytes(self) -> int:
        """Of its elements, each once: an expanded dimension has one."""
        total = WIDTHS[self.dtype]
        for size, stride in zip(self.shape, self.strides, strict=True):
            total *= size if stride or size == 0 else 1
        return total


WIDTHS = {
    "bool": 1, "uint8": 1, "int8": 1, "int16": 2, "int32": 4, "int64": 8,
    "bfloat16": 2, "float16": 2, "float32": 4, "float64": 8,
}  # fmt: skip
"""Bytes an element."""


@dataclass(frozen=True, kw_only=True)
class Node:
    """`target`: the operator's name (`aten.linear.default`), or nothing. `values`: one for each result. `flops` of a
    forward pass. `saved`: bytes that it keeps for its backward pass, beside parameters and what an operator before it
    keeps already. `module`: the path of the module that it came from. `random`: it draws random numbers."""

    name: str
    kind: str
    target: str = ""
    args: tuple[Any, ...] = ()
    kwargs: Mapping[str, Any] = field(default_factory=dict)
    values: tuple[Value, ...] = ()
    flops: float = 0.0
    saved: int = 0
    module: str = ""
    random: bool = False

    @functools.cached_property
    def reads(self) -> tuple[str, ...]:
        """Names of nodes, each once, in the order of the arguments."""
        return tuple(dict.fromkeys(_references([*self.args, *self.kwargs.values()], "node")))

    @functools.cached_property
    def tensors(self) -> tuple[str, ...]:
        """Keys of parameters, constants and variables, likewise."""
        return tuple(dict.fromkeys(_references([*self.args, *self.kwargs.values()], "tensor")))

    @property
    def nbytes(self) -> int:
        return sum(value.nbytes for value in self.values)

    @property
    def number(self) -> bool:
        """Whether it is a whole number and no more; of one row's token that could not be said."""
        return all(
            value.dtype == "int64" and len(value.shape) <= 1 and math.prod(value.shape) == 1 for value in self.values
        )

    @property
    def block(self) -> str:
        """The layer that it belongs to: its module's path up to the first number, or the module itself."""
        indexed = _INDEXED.match(self.module)
        return indexed.group(1) if indexed else self.module


@dataclass(frozen=True, kw_only=True)
class Graph:
    """`nodes` in the order in which they run. `parameters`, `constants` and `variables`: what tensors are, by key;
    `aliases`: names of parameters that are another key's. `updates`: of each variable, the node that gives its next
    state. `outputs`: names of nodes; of a job that trains the loss alone.

    ValueError where it does not hang together: what a file from elsewhere says is not believed.
    """

    nodes: tuple[Node, ...]
    outputs: tuple[str, ...]
    parameters: Mapping[str, Value]
    constants: Mapping[str, Value] = field(default_factory=dict)
    variables: Mapping[str, Value] = field(default_factory=dict)
    aliases: Mapping[str, str] = field(default_factory=dict)
    updates: Mapping[str, str] = field(default_factory=dict)

    def __post_init__(self) -> None:
        known: set[str] = set()
        tensors = {*self.parameters, *self.constants, *self.variables}
        for node in self.nodes:
            if node.kind not in KINDS:
                raise ValueError(f"node {node.name}: kind={node.kind}: must be one of {', '.join(KINDS)}")
            if node.name in known:
                raise ValueError(f"node {node.name}: is there twice")
            for name in node.reads:
                if name not in known:
                    raise ValueError(f"node {node.name}: reads {name}, which no node before it gives")
            for key in node.tensors:
                if key not in tensors:
                    raise ValueError(f"node {node.name}: reads tensor {key}, which the graph does not have")
            known.add(node.name)
        for name in (*self.outputs, *self.updates.values()):
            if name not in known:
                raise ValueError(f"output {name}: no node of the graph")

    @functools.cached_property
    def by_name(self) -> dict[str, Node]:
        return {node.name: node for node in self.nodes}

    @property
    def loss(self) -> str | None:
        """The node that the backward pass begins at."""
        return next((node.name for node in self.nodes if node.kind == "loss"), None)

    @property
    def operators(self) -> tuple[Node, ...]:
        """What is computed."""
        return tuple(node for node in self.nodes if node.kind not in ("placeholder", "variable"))

    @functools.cached_property
    def free(self) -> frozenset[str]:
        """Operators that depend on no parameter, no variable, no random number, and no input but a single number, such
        as a position: masks, positions' sines. Whoever needs one computes it, and nobody sends it."""
        found = {node.name for node in self.nodes if node.kind == "placeholder" and node.number}
        given = frozenset(found)
        for node in self.operators:
            fixed = not node.random and all(key in self.constants for key in node.tensors)
            if fixed and all(name in found for name in node.reads):
                found.add(node.name)
        return frozenset(found - given)

    @functools.cached_property
    def trained(self) -> frozenset[str]:
        """Nodes that a parameter is behind, so that a gradient passes them: floating point alone."""
        found: set[str] = set()
        for node in self.operators:
            floats = any(map(_floats, node.values))
            behind = any(key in self.parameters for key in node.tensors) or any(name in found for name in node.reads)
            if floats and behind:
                found.add(node.name)
        return frozenset(found)

    @functools.cached_property
    def hidden(self) -> frozenset[str]:
        """Hidden states: floating point that a matrix of weights is behind, trained or frozen. Not masks and positions,
        whatever tensors they are made of."""
        weights = {**self.parameters, **self.constants}
        matrices = {key for key, value in weights.items() if _floats(value) and len(value.shape) > 1}
        found: set[str] = set()
        for node in self.operators:
            behind = any(key in matrices for key in node.tensors) or any(name in found for name in node.reads)
            if behind and any(map(_floats, node.values)):
                found.add(node.name)
        return self.trained | found

    def to_json(self) -> dict[str, Any]:
        """Plain lists, dicts, numbers and text."""
        return {"version": VERSION, **asdict(self)}

    @classmethod
    def of_json(cls, data: Mapping[str, Any]) -> Self:
        """ValueError for what is no graph."""
        if not isinstance(data, Mapping):
            raise ValueError("no graph: must be settings, `nodes` among them")
        if data.get("version") != VERSION:
            raise ValueError(f"version={data.get('version')}: this reads graphs of version {VERSION}")

        def value(each: Mapping[str, Any]) -> Value:
            if each["dtype"] not in WIDTHS:
                raise ValueError(f"dtype={each['dtype']}: must be one of {', '.join(WIDTHS)}")
            return Value(dtype=each["dtype"], shape=tuple(each["shape"]), strides=tuple(each["strides"]))

        def node(each: Mapping[str, Any]) -> Node:
            values = tuple(value(one) for one in each["values"])
            return Node(**{**each, "args": tuple(each["args"]), "values": values})

        try:
            kinds = ("parameters", "constants", "variables")
            return cls(
                nodes=tuple(node(each) for each in data["nodes"]),
                outputs=tuple(data["outputs"]),
                **{kind: {key: value(each) for key, each in data[kind].items()} for kind in kinds},
                aliases=dict(data["aliases"]),
                updates=dict(data["updates"]),
            )
        except (KeyError, TypeError, AttributeError) as error:
            raise ValueError(f"no graph: {type(error).__name__}: {error}") from None


def _floats(value: Value) -> bool:
    return value.dtype.startswith(("float", "bfloat"))


def _references(value: Any, kind: str) -> Iterator[str]:
    if isinstance(value, Mapping):
        if set(value) == {kind}:
            yield value[kind]
        else:
            for each in value.values():
                yield from _references(each, kind)
    elif isinstance(value, (tuple, list)):
        for each in value:
            yield from _references(each, kind)
