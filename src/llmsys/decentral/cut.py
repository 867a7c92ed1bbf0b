"""Stages: a graph cut at any operators, with what each of them has to be sent, and what it sends.

A stage runs a part of the nodes. What crosses a cut is

    the results that a later stage reads     once to each of them, on from stage to stage in their order
    gradients                                back along the same way, in the opposite order
    nothing that depends on no parameter and no input but a number (`Graph.free`): each stage computes that for itself

So a tensor that several later stages read goes to the first of them, which hands it on; and its gradient gathers on the
way back. Autograd adds the gradients of a tensor's readers from the last to the first, and so does that way: sums have
the bits of the uncut model. A parameter that several stages read (tied embeddings) is on each of them, and its gradient
takes the same way to the first, who owns it.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from itertools import pairwise
from typing import Any, Self

from llmsys.decentral.graph import ITEM, Graph, Node


@dataclass(frozen=True, kw_only=True)
class Stage:
    """`nodes`: what it runs, in order, recomputed ones among them. `inputs`: placeholders that it is fed.
    `receives`: tensors, and the stage that sends each; `sends`: tensors, and the stage that each goes on to (a tensor
    goes to at most one: that one hands it on); `trained`: of both, those that a gradient may go back of; `hidden`:
    those that are hidden states (`Graph.hidden`). `parameters` that it reads; `shares`: of these, those that an earlier
    stage reads too, and that stage, to which the gradient goes; `hears`: those that a later one reads too, and the next
    of them, whose gradient comes here. A parameter's owner is the first to read it; `tells`: the others, of what this
    stage owns, that are to have its new values. `constants`, `variables` that it reads.
    """

    index: int
    nodes: tuple[str, ...]
    inputs: tuple[str, ...]
    receives: Mapping[str, int]
    trained: tuple[str, ...]
    hidden: tuple[str, ...]
    sends: Mapping[str, int]
    parameters: tuple[str, ...]
    shares: Mapping[str, int]
    hears: Mapping[str, int]
    tells: Mapping[str, tuple[int, ...]]
    constants: tuple[str, ...]
    variables: tuple[str, ...]

    def to_json(self) -> dict[str, Any]:
        """Plain lists, dicts, numbers and text."""
        return asdict(self)

    @classmethod
    def of_json(cls, data: Mapping[str, Any]) -> Self:
        """ValueError for what is no stage."""
        lists = ("nodes", "inputs", "trained", "hidden", "parameters", "constants", "variables")
        maps = ("receives", "sends", "shares", "hears")
        if not isinstance(data, Mapping) or set(data) != {"index", "tells", *lists, *maps}:
            raise ValueError("no stage: other settings")
        if type(data["index"]) is not int or not isinstance(data["tells"], Mapping):
            raise ValueError("no stage: index: must be a number; tells: stages by name")
        tells = {key: tuple(int(each) for each in value) for key, value in data["tells"].items()}
        for key in lists:
            if not isinstance(data[key], (list, tuple)) or not all(isinstance(each, str) for each in data[key]):
                raise ValueError(f"no stage: {key}: must be names")
        for key in maps:
            if not isinstance(data[key], Mapping) or not all(type(each) is int for each in data[key].values()):
                raise ValueError(f"no stage: {key}: must be stages by name")
        return cls(
            index=data["index"],
            tells=tells,
            **{key: tuple(data[key]) for key in lists},  # type: ignore[arg-type]
            **{key: dict(data[key]) for key in maps},  # type: ignore[arg-type]
        )


def part(graph: Graph, stage: Stage) -> Graph:
    """What of `graph` somebody has to know who runs `stage`: its nodes, and what it is sent as placeholders."""
    names = {*stage.nodes, *stage.inputs}
    nodes = [
        Node(name=node.name, kind="placeholder", values=node.values) if node.name in stage.receives else node
        for node in graph.nodes
        if node.name in names or node.name in stage.receives
    ]
    return Graph(
        nodes=tuple(nodes),
        outputs=tuple(name for name in graph.outputs if name in stage.nodes),
        parameters={key: graph.parameters[key] for key in stage.parameters},
        constants={key: graph.constants[key] for key in stage.constants},
        variables={key: graph.variables[key] for key in stage.variables},
        updates={key: name for key, name in graph.updates.items() if name in stage.nodes},
    )


def contiguous(graph: Graph, boundaries: Sequence[int]) -> dict[str, int]:
    """The assignment that begins a new stage at each of `boundaries`, places among `graph.operators`. ValueError where
    they do not rise, or lie outside."""
    operators = graph.operators
    edges = [0, *boundaries, len(operators)]
    if any(low >= high for low, high in pairwise(edges)):
        raise ValueError(f"boundaries={list(boundaries)}: must rise, within 1 and {len(operators) - 1}")
    return {node.name: stage for stage, (low, high) in enumerate(pairwise(edges)) for node in operators[low:high]}


def cut(graph: Graph, assignment: Mapping[str, int]) -> tuple[Stage, ...]:
    """Stages 0 to the largest number in `assignment`, which has one for every operator of the graph.

    One of several results of an operator goes where the operator goes, since no message has a tuple in it. Raises
    ValueError for an operator without a stage, for a stage without an operator, and where an operator reads what a
    later stage gives: a pipeline goes one way.
    """
    owner = _owners(graph, assignment)
    count = max(owner.values()) + 1
    if missing := set(range(count)) - set(owner.values()):
        raise ValueError(f"stage {min(missing)}: has no operator; stages are numbered 0 to {count - 1}")
    runs = _runs(graph, owner, count)
    return tuple(_stage(graph, owner, runs, index) for index in range(count))


def _owners(graph: Graph, assignment: Mapping[str, int]) -> dict[str, int]:
    owner: dict[str, int] = {}
    for node in graph.operators:
        if node.name not in assignment:
            raise ValueError(f"operator {node.name}: has no stage")
        owner[node.name] = owner[node.reads[0]] if node.target == ITEM else assignment[node.name]
        if owner[node.name] < 0:
            raise ValueError(f"operator {node.name}: stage {owner[node.name]}: stages are numbered from 0")
        late = [name for name in node.reads if owner.get(name, 0) > owner[node.name] and name not in graph.free]
        if late:
            raise ValueError(
                f"operator {node.name} of stage {owner[node.name]}: reads {late[0]} of stage {owner[late[0]]}, "
                "which runs later"
            )
    return owner


def _runs(graph: Graph, owner: Mapping[str, int], count: int) -> list[set[str]]:
    """Of each stage, what it runs: its own nodes, and the free ones that they need, wherever else these run."""
    runs: list[set[str]] = [set() for _ in range(count)]
    needed = {*graph.outputs, *graph.updates.values()}
    for node in reversed(graph.operators):
        own = node.name not in graph.free or node.name in needed
        places = {index for index, names in enumerate(runs) if node.name in names}
        places |= {owner[node.name]} if own else set()
        for index in places:
            runs[index].add(node.name)
            runs[index].update(name for name in node.reads if name in graph.free)
    return runs


def _stage(graph: Graph, owner: Mapping[str, int], runs: Sequence[set[str]], index: int) -> Stage:
    nodes = tuple(node for node in graph.operators if node.name in runs[index])
    users: dict[str, list[int]] = {}
    readers: dict[str, list[int]] = {}
    for place, names in enumerate(runs):
        for node in (graph.by_name[name] for name in names):
            for name in node.reads:
                if name in owner and name not in graph.free and owner[name] != place:
                    users.setdefault(name, []).append(place)
            for key in node.tensors:
                readers.setdefault(key, []).append(place)
    receives: dict[str, int] = {}
    sends: dict[str, int] = {}
    for name in (node.name for node in graph.operators if node.name in users):
        way = [owner[name], *sorted(set(users[name]))]
        for here, there in pairwise(way):
            if there == index:
                receives[name] = here
            if here == index:
                sends[name] = there
    tensors = tuple(dict.fromkeys(key for node in nodes for key in node.tensors))
    shares, hears, tells = {}, {}, {}
    for key in (key for key in tensors if key in graph.parameters):
        way = sorted(set(readers[key]))
        if (at := way.index(index)) > 0:
            shares[key] = way[at - 1]
        elif len(way) > 1:
            tells[key] = tuple(way[1:])
        if at + 1 < len(way):
            hears[key] = way[at + 1]
    inputs = {name for node in nodes for name in node.reads if graph.by_name[name].kind == "placeholder"}
    return Stage(
        index=index,
        nodes=tuple(node.name for node in nodes),
        inputs=tuple(node.name for node in graph.nodes if node.name in inputs),
        receives=receives,
        trained=tuple(name for name in {**receives, **sends} if name in graph.trained),
        hidden=tuple(name for name in {**receives, **sends} if name in graph.hidden),
        sends=sends,
        parameters=tuple(key for key in tensors if key in graph.parameters),
        shares=shares,
        hears=hears,
        tells=tells,
        constants=tuple(key for key in tensors if key in graph.constants),
        variables=tuple(key for key in tensors if key in graph.variables),
    )
