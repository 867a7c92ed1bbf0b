"""A torch module as a graph of operators: `torch.export`, made functional, and written down by names and constants.

What comes out computes the module's own bits: the operators are those that the module calls, in its order. A module
that picks its way by the numbers in its inputs, or calls what torch cannot look into, does not export, and is refused
with what torch says of it.
"""

from __future__ import annotations

import dataclasses
import operator
import warnings
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode, resolve_name

from llmsys.decentral.graph import ITEM, WIDTHS, Graph, Node, Value
from llmsys.decentral.planes.saved import saved

NO_GRAD = "wrap_with_set_grad_enabled"


class Traced:
    """A graph, and what its parameters, constants and variables held when it was traced, by key (`tensors`)."""

    def __init__(self, graph: Graph, tensors: Mapping[str, Tensor]) -> None:
        self.graph, self.tensors = graph, dict(tensors)


def trace(model: nn.Module, example: Mapping[str, Any]) -> Traced:
    """`model` called with `example` by keyword, in the mode (training or not) that it is in.

    What it returns is its loss, where it has one, else its logits, else its first tensor. Shapes are the example's.
    Raises ValueError for a module that does not export, with the function of torch at which it ended, that runs
    operators of another library than torch's own, or that computes with parameters where it has switched gradients off.
    """
    whole, called = _Whole(model), _Called()
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            with called:
                exported = torch.export.export(whole, (), kwargs=dict(example), strict=False)
            _gradients_flow(exported)
            tied = _untied(exported)
            plain = exported.run_decompositions({})
    except ValueError:
        raise
    except Exception as error:  # torch raises many kinds, some of its own, some the model's
        raise ValueError(f"{type(model).__name__} does not export: {called.last}: {_first_line(error)}") from error
    traced = _Reading(plain, tied).traced()
    kept = saved(traced.graph) if traced.graph.loss else {}
    nodes = tuple(dataclasses.replace(node, saved=kept.get(node.name, 0)) for node in traced.graph.nodes)
    return Traced(dataclasses.replace(traced.graph, nodes=nodes), traced.tensors)


class _Called(TorchFunctionMode):
    """Knows which function of torch was called last: the one that did not export."""

    last = "torch.export"

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = resolve_name(func) or getattr(func, "__name__", str(func))
        if "_set_grad_enabled" not in name:  # which torch.export calls around everything
            self.last = name
        return func(*args, **(kwargs or {}))


class _Whole(nn.Module):
    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, **given: Any) -> Tensor:
        found = self.model(**given)
        if isinstance(found, Tensor):
            return found
        for name in ("loss", "logits"):
            value = found.get(name) if isinstance(found, Mapping) else getattr(found, name, None)
            if isinstance(value, Tensor):
                return value
        first: Tensor = found[0]
        return first


PREFIX = "model."
"""What `_Whole` puts before each name."""


def _first_line(error: Exception) -> str:
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return lines[0] if lines else type(error).__name__


def _gradients_flow(exported: Any) -> None:
    """ValueError where a region without gradients reads what a parameter is behind: a plain graph would train it."""
    specs = [spec for spec in exported.graph_signature.input_specs if spec.kind.name == "PARAMETER"]
    parameters = {spec.arg.name for spec in specs if exported.state_dict[spec.target].requires_grad}
    behind: set[Any] = set()
    for node in exported.graph.nodes:
        if (node.op == "placeholder" and node.name in parameters) or any(n in behind for n in node.all_input_nodes):
            if NO_GRAD in str(node.target) and node.args[0] is False:
                raise ValueError(f"{node.name}: computes with parameters where gradients are switched off")
            behind.add(node)


def _untied(exported: Any) -> dict[str, str]:
    """Parameters that are another one's tensor -> that one; in `exported` each has a tensor of its own from now on, as
    torch cannot decompose a program in which one of two names of a tensor might be changed in place."""
    first: dict[tuple[Any, ...], str] = {}
    tied: dict[str, str] = {}
    for spec in exported.graph_signature.input_specs:
        if spec.kind.name != "PARAMETER":
            continue
        tensor = exported.state_dict[spec.target]
        where = (tensor.untyped_storage()._cdata, tensor.storage_offset(), *tensor.shape, *tensor.stride())
        if first.setdefault(where, spec.target) != spec.target:
            tied[spec.target] = first[where]
            exported.state_dict[spec.target] = nn.Parameter(tensor.detach().clone(), tensor.requires_grad)
    return tied


class _Reading:
    """One exported program. `tied`: parameters that are another one's tensor."""

    def __init__(self, exported: Any, tied: Mapping[str, str]) -> None:
        self.exported, self.signature, self.tied = exported, exported.graph_signature, tied
        self.keys: dict[str, str] = {}
        self.tensors: dict[str, Tensor] = {}
        self.kinds: dict[str, dict[str, Value]] = {"parameters": {}, "constants": {}, "variables": {}}
        self.aliases: dict[str, str] = {}
        self.updates: dict[str, str] = {}
        self._own()

    def _own(self) -> None:
        """The tensors that come with the program."""
        changed = {spec.target for spec in self.signature.output_specs if spec.kind.name == "BUFFER_MUTATION"}
        for spec in self.signature.input_specs:
            kind = spec.kind.name
            if kind == "USER_INPUT":
                continue
            if kind not in ("PARAMETER", "BUFFER", "CONSTANT_TENSOR"):
                raise ValueError(f"{spec.arg.name}: an input of kind {kind}, which a graph has no word for")
            state, constants = self.exported.state_dict, self.exported.constants
            tensor = state[spec.target] if spec.target in state else constants[spec.target]
            key = spec.target.removeprefix(PREFIX)
            if spec.target in self.tied:
                self.aliases[key] = self.keys[spec.arg.name] = self.tied[spec.target].removeprefix(PREFIX)
                continue
            trained = kind == "PARAMETER" and tensor.requires_grad  # a frozen weight is a constant
            group = "parameters" if trained else "variables" if spec.target in changed else "constants"
            self.kinds[group][key] = value_of(tensor)
            self.tensors[key] = tensor.detach()
            self.keys[spec.arg.name] = key

    def traced(self) -> Traced:
        nodes: list[Node] = []
        outputs: list[str] = []
        for node in self.exported.graph.nodes:
            if node.op == "placeholder":
                if node.name not in self.keys and isinstance(node.meta.get("val"), Tensor):
                    nodes.append(Node(name=node.name, kind="placeholder", values=(value_of(node.meta["val"]),)))
            elif node.op == "output":
                outputs = self._ends(node)
            elif node.op == "call_function":
                if node.meta.get("val") is not None:  # else an assertion that tracing has already seen hold
                    nodes.append(self._operator(node))
            else:
                raise ValueError(f"{node.name}: a node of kind {node.op}, which a graph has no word for")
        last = nodes[[node.name for node in nodes].index(outputs[0])]
        if last.values[0].shape == () and len(outputs) == 1:
            nodes[nodes.index(last)] = dataclasses.replace(last, kind="loss")
        return Traced(Graph(nodes=tuple(nodes), outputs=tuple(outputs), aliases=self.aliases, updates=self.updates,
                            **self.kinds), self.tensors)  # fmt: skip

    def _ends(self, node: Any) -> list[str]:
        found = []
        for spec, value in zip(self.signature.output_specs, node.args[0], strict=True):
            if spec.kind.name == "BUFFER_MUTATION":
                self.updates[spec.target.removeprefix(PREFIX)] = value.name
            elif spec.kind.name == "USER_OUTPUT":
                found.append(value.name)
            else:
                raise ValueError(f"{value}: an output of kind {spec.kind.name}, which a graph has no word for")
        return found

    def _operator(self, node: Any) -> Node:
        target = _target(node)
        value = node.meta["val"]
        results = value if isinstance(value, (tuple, list)) else (value,)
        args = [self._plain(each) for each in node.args]
        kwargs = {key: self._plain(each) for key, each in node.kwargs.items()}
        own = Node(
            name=node.name,
            kind="operator",
            target=target,
            args=tuple(args),
            kwargs=kwargs,
            values=tuple(value_of(each) for each in results if isinstance(each, Tensor)),
            flops=0.0 if target == ITEM else _flops(node),
            module=_module(node),
            random=_draws(node),
        )
        parametric = any(key in self.kinds["parameters"] for key in own.tensors)
        return dataclasses.replace(own, kind="parametric") if parametric else own

    def _plain(self, value: Any) -> Any:
        """An argument as JSON."""
        if isinstance(value, torch.fx.Node):
            if value.name in self.keys:
                return {"tensor": self.keys[value.name]}
            return {"node": value.name}
        if isinstance(value, (tuple, list)):
            return [self._plain(each) for each in value]
        return plain_constant(value)


def plain_constant(value: Any) -> Any:
    """A number, a name, a dtype or a layout as JSON. ValueError for anything else."""
    if value is None or isinstance(value, (bool, int, str)):
        return value
    if isinstance(value, float):
        return value if abs(value) < float("inf") else {"float": repr(value)}
    for kind, name in ((torch.dtype, "dtype"), (torch.layout, "layout"), (torch.memory_format, "memory_format")):
        if isinstance(value, kind):
            return {name: str(value).removeprefix("torch.")}
    if isinstance(value, torch.device):
        return {"device": "own"}
    raise ValueError(f"{value!r}: an argument of {type(value).__name__}, which a graph has no word for")


def value_of(tensor: Tensor) -> Value:
    """ValueError for sizes that are not numbers, and for dtypes that nothing can be sent in."""
    dtype = str(tensor.dtype).removeprefix("torch.")
    if dtype not in WIDTHS:
        raise ValueError(f"a tensor of {dtype}: must be one of {', '.join(WIDTHS)}")
    if not all(isinstance(size, int) for size in tensor.shape):
        raise ValueError(f"a tensor of shape {tuple(tensor.shape)}: sizes must be numbers")
    return Value(dtype=dtype, shape=tuple(tensor.shape), strides=tuple(tensor.stride()))


def _target(node: Any) -> str:
    if node.target is operator.getitem:
        return ITEM
    if isinstance(node.target, torch._ops.OpOverload) and node.target.namespace == "aten":
        # a kernel may lay its result out otherwise than the tracer thought: then a view of it has to be a copy
        return "aten.reshape.default" if node.target is torch.ops.aten.view.default else str(node.target)
    raise ValueError(f"{node.name}: calls {node.target}, which is no operator of torch's own (aten)")


def _draws(node: Any) -> bool:
    """Random numbers: attention is marked as if it did, and does with dropout alone."""
    if node.target is torch.ops.aten.scaled_dot_product_attention.default:
        return bool(node.kwargs.get("dropout_p", node.args[4] if len(node.args) > 4 else 0.0))
    tags = node.target.tags if isinstance(node.target, torch._ops.OpOverload) else ()
    return torch.Tag.nondeterministic_seeded in tags


def _flops(node: Any) -> float:
    """As torch counts them: 2 for each multiply-add of products and convolutions."""
    from torch.utils.flop_counter import FlopCounterMode

    def fake(value: Any) -> Any:
        return torch.fx.node.map_arg(value, lambda each: each.meta["val"])

    mode: Callable[[], Any] | None = next(
        (n.meta["val"].fake_mode for n in node.all_input_nodes if hasattr(n.meta.get("val"), "fake_mode")), None
    )
    if mode is None or not any(word in str(node.target) for word in PRODUCTS):
        return 0.0
    with mode, FlopCounterMode(display=False) as counter:  # type: ignore[attr-defined]
        node.target(*fake(node.args), **fake(node.kwargs))
    return float(counter.get_total_flops())


PRODUCTS = ("linear", "mm", "matmul", "conv", "attention")
"""Words in the names of operators that have a count; the others are asked for nothing."""


def _module(node: Any) -> str:
    stack = node.meta.get("nn_module_stack") or {}
    path = list(stack.values())[-1][0] if stack else ""
    return str(path).removeprefix("model").removeprefix(".")
