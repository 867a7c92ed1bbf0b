"""A stage as two functions of named tensors, forward and backward, for planes that differentiate nothing themselves.

Both come from one joint graph: what `planes.torch.Run` does for a micro-batch, its derivatives as autograd takes them
included, traced on tensors without elements. What forward computes and backward reads is kept between them; parameters
are arguments, so that the two serve all steps.

    p/<key>   b/<key>   c/<key>     parameters, variables, constants
    in/<name>   got/<name>          placeholders; what came from stages before
    sent/<name>   result   b/<key>  what forward gives: what goes on, the loss or tokens, variables as they are next
    kept/<number>                   what backward needs of what forward has computed
    from/<name>   shared/<key>      gradients of what was sent; sums so far of those of shared parameters
    back/<name>   grad/<key>        what backward gives: gradients of what was received, and of parameters
"""

from __future__ import annotations

import operator
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx
from torch._decomp import core_aten_decompositions
from torch.fx.experimental.proxy_tensor import make_fx
from torch.nn.attention import SDPBackend, sdpa_kernel

from llmsys.decentral.cut import Stage
from llmsys.decentral.graph import Graph, Value
from llmsys.decentral.planes import Rules
from llmsys.decentral.planes.torch import Run

PARAMETER, VARIABLE, CONSTANT, INPUT, RECEIVED = "p/", "b/", "c/", "in/", "got/"
SENT, RESULT, KEPT, FROM, SHARED, BACK, GRADIENT = "sent/", "result", "kept/", "from/", "shared/", "back/", "grad/"


@dataclass(frozen=True, eq=False)
class Function:
    """`module` takes tensors in the order of `takes`, laid out as `values` say, and gives those of `gives`."""

    module: fx.GraphModule
    takes: tuple[str, ...]
    gives: tuple[str, ...]
    values: Mapping[str, Value]


def functions(
    graph: Graph, stage: Stage, rules: Rules, device: torch.device | str = "cpu"
) -> tuple[Function, Function]:
    """Forward and backward of `stage`, whose part of the graph is `graph`; gradients are of its share of the
    step's loss. Of what is not trained, backward gives nothing. What they make themselves they make on `device`.

    ValueError for an operator that draws random numbers: what it drew in one framework is not drawn again in another.
    """
    for name in stage.nodes:
        if graph.by_name[name].random:
            raise ValueError(f"operator {name}: draws random numbers, which only the torch plane draws again; "
                             "train without dropout")  # fmt: skip
    values = _given(graph, stage, backward=not rules.streams)
    takes = (*values,)
    gives: list[str] = []

    def joint(*tensors: Tensor) -> list[Tensor]:
        given = dict(zip(takes, tensors, strict=True))
        own = {key: given[p + key] for p, keys in _tensors(stage) for key in keys}
        run = Run(graph, stage, own, train=not rules.streams, share=1.0 / rules.micro_batches)
        sent = run.forward(under(given, INPUT), under(given, RECEIVED))
        out = {SENT + name: each for name, each in sent.items()}
        for each in run.outputs.values():
            out[RESULT] = each
        out |= {VARIABLE + key: each for key, each in run.updates.items()}
        if rules.streams:
            gives[:] = out
            return [*out.values()]
        back, found = run.backward(under(given, FROM), under(given, SHARED))
        out |= {BACK + name: each for name, each in back.items()}
        out |= {GRADIENT + key: each for key, each in found.items()}
        gives[:] = out
        return [*out.values()]

    examples = [
        torch.empty_strided(v.shape, v.strides, dtype=getattr(torch, v.dtype), device=device) for v in values.values()
    ]
    with sdpa_kernel(SDPBackend.MATH):  # whose operators every framework has
        table = {**core_aten_decompositions(), torch.ops.aten.copy.default: _copy}
        traced = make_fx(joint, table, tracing_mode="fake")(*examples)
    traced.graph.eliminate_dead_code()
    return _split(traced, values, takes, gives)


def _copy(own: Tensor, source: Tensor, non_blocking: bool = False) -> Tensor:
    """The exporter forgets that a source of fewer dimensions is expanded."""
    return source.to(own.dtype).expand(own.shape)


def _given(graph: Graph, stage: Stage, *, backward: bool) -> dict[str, Value]:
    """What the two take together."""
    kinds = {PARAMETER: graph.parameters, VARIABLE: graph.variables, CONSTANT: graph.constants}
    found = {p + key: kinds[p][key] for p, keys in _tensors(stage) for key in keys}
    found |= {INPUT + name: graph.by_name[name].values[0] for name in stage.inputs}
    found |= {RECEIVED + name: graph.by_name[name].values[0] for name in stage.receives}
    if not backward:
        return found
    found |= {FROM + name: graph.by_name[name].values[0] for name in stage.sends if name in stage.trained}
    return found | {SHARED + key: graph.parameters[key] for key in stage.hears}


def _tensors(stage: Stage) -> tuple[tuple[str, Sequence[str]], ...]:
    return (PARAMETER, stage.parameters), (VARIABLE, stage.variables), (CONSTANT, stage.constants)


def under(given: Mapping[str, Tensor], prefix: str) -> dict[str, Tensor]:
    return {name.removeprefix(prefix): each for name, each in given.items() if name.startswith(prefix)}


def _split(
    traced: fx.GraphModule, values: Mapping[str, Value], takes: Sequence[str], gives: Sequence[str]
) -> tuple[Function, Function]:
    """Forward is whatever its results need; the rest is backward."""
    nodes = [*traced.graph.nodes]
    given = dict(zip((n for n in nodes if n.op == "placeholder"), takes, strict=True))
    results = dict(zip(gives, nodes[-1].args[0], strict=True))
    ahead = {name: node for name, node in results.items() if not name.startswith((BACK, GRADIENT))}
    behind = {name: node for name, node in results.items() if name not in ahead}
    early: set[fx.Node] = set()
    due = [*ahead.values()]
    while due:
        node = due.pop()
        if node not in early:
            early.add(node)
            due += node.all_input_nodes
    for node in nodes:  # one of several results travels, and not all of them
        if node.target is operator.getitem and node.args[0] in early:
            early.add(node)
    late = [n for n in nodes if n not in early and n.op not in ("placeholder", "output")]
    wanted = dict.fromkeys(n for node in late for n in node.all_input_nodes)
    wanted |= dict.fromkeys(behind.values())
    kept = {f"{KEPT}{at}": n for at, n in enumerate(n for n in wanted if n in early and n not in given)}
    taken = {name: node for node, name in given.items()}
    first = {name: node for name, node in taken.items() if node in early}
    second = {**{name: node for name, node in taken.items() if node in wanted}, **kept}
    return (
        _function(traced, first, [n for n in nodes if n in early and n not in given], ahead | kept, values),
        _function(traced, second, late, behind, values),
    )


def _function(
    traced: fx.GraphModule,
    takes: Mapping[str, fx.Node],
    nodes: Sequence[fx.Node],
    gives: Mapping[str, fx.Node],
    values: Mapping[str, Value],
) -> Function:
    graph, here = fx.Graph(), dict[fx.Node, fx.Node]()
    for at, node in enumerate(takes.values()):
        here[node] = graph.placeholder(f"take_{at}")
        here[node].meta = node.meta
    for node in nodes:
        here[node] = graph.node_copy(node, lambda n: here[n])
    graph.output([here[node] for node in gives.values()])
    found = dict(values)
    for name, node in takes.items():
        found.setdefault(name, _value(node.meta["val"]))
    own: Any = fx.GraphModule(traced, graph)
    return Function(own, (*takes,), (*gives,), {name: found[name] for name in takes})


def _value(tensor: Tensor) -> Value:
    dtype = str(tensor.dtype).removeprefix("torch.")
    return Value(dtype=dtype, shape=tuple(tensor.shape), strides=tuple(tensor.stride()))
