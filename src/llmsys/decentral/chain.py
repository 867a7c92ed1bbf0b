"""A graph as the planner sees it: operators in the order in which they run, and what each cut between two would cost.

Position i lies before operator i; 0 and the number of operators are the ends. Over a cut at i goes what an operator
before it gives and one behind it reads, forward (`ahead`), and of it what a gradient passes back (`back`). A tensor
that skips stages is counted on every cut that it passes, though `cut` may send it past them: where that differs, a plan
is better than it says.
"""

from __future__ import annotations

import dataclasses
import functools
import itertools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray

from llmsys.decentral.graph import ITEM, Graph, Node
from llmsys.schema.decentral import LEVELS

Numbers = NDArray[np.float64]
CUT = ("ahead", "back", "hidden")


@dataclass(frozen=True, kw_only=True, eq=False)
class Chain:
    """Of a micro-batch, and of L operators. `work`: FLOPs forward. `weights`: bytes of the parameters it reads; those
    of `ties` are another's too: (first reader, next reader, bytes), and on one stage they are there once. `held`: bytes
    of constants and variables. `saved`: bytes kept for the backward pass. All (L,). `ahead`, `back`: bytes over each
    position, (L+1,); `hidden`: of `ahead`, those of hidden states in fp32, which may be compressed. `places`: positions
    where it may be cut, the ends among them, rising. `blocks`: of each operator, the layer that it belongs to, where
    that is known. `tokens` of the micro-batch. ValueError where sizes do not agree, or something is negative.
    """

    names: tuple[str, ...]
    work: Numbers
    weights: Numbers
    saved: Numbers
    ahead: Numbers
    back: Numbers
    hidden: Numbers = field(default_factory=lambda: np.zeros(0))
    held: Numbers = field(default_factory=lambda: np.zeros(0))
    ties: tuple[tuple[int, int, float], ...] = ()
    places: NDArray[np.int64] = field(default_factory=lambda: np.zeros(0, np.int64))
    blocks: tuple[str, ...] = ()
    tokens: int = 1

    def __post_init__(self) -> None:
        count = len(self.names)
        if not len(self.held):
            object.__setattr__(self, "held", np.zeros(count))
        if not len(self.hidden):
            object.__setattr__(self, "hidden", self.back)
        if not len(self.places):
            object.__setattr__(self, "places", np.arange(count + 1))
        for name in ("work", "weights", "saved", "held", *CUT):
            values = getattr(self, name)
            expected = count + (name in CUT)
            if values.shape != (expected,):
                raise ValueError(f"{name}: {len(values)} numbers; {count} operators have {expected}")
            if count and not (np.isfinite(values).all() and values.min() >= 0):
                raise ValueError(f"{name}: must be 0 or more everywhere")
        if count == 0 or self.places[0] != 0 or self.places[-1] != count or (np.diff(self.places) <= 0).any():
            raise ValueError(f"places: must rise from 0 to {count}")

    @property
    def count(self) -> int:
        return len(self.names)

    @functools.cached_property
    def weight_bytes(self) -> float:
        """Of all parameters, each once."""
        return float(self.weights.sum()) - sum(nbytes for *_, nbytes in self.ties)

    def at(self, boundaries: Sequence[int]) -> dict[str, int]:
        """The assignment of operators to stages that `cut` takes, cut at these positions."""
        stages = np.searchsorted(np.asarray(boundaries), np.arange(self.count), side="right")
        return {name: int(stage) for name, stage in zip(self.names, stages, strict=True)}

    def repeated(self, begin: int, end: int, times: int) -> Chain:
        """With operators `begin` to `end` there `times` times in all: a model with more layers of the same. ValueError
        where another amount goes into them than comes out, or where a tied parameter is read within."""
        if (self.ahead[begin], self.back[begin]) != (self.ahead[end], self.back[end]):
            raise ValueError(f"positions {begin} and {end}: another amount crosses them; this is no repeated layer")
        if any(begin <= reader < end for tie in self.ties for reader in tie[:2]):
            raise ValueError(f"operators {begin} to {end}: read a tied parameter; this is no repeated layer")
        order = np.r_[0:begin, np.tile(np.arange(begin, end), times), end : self.count]
        more = (times - 1) * (end - begin)
        inside = self.places[(self.places >= begin) & (self.places < end)]
        copies = [inside + k * (end - begin) for k in range(times)]
        places = [self.places[self.places < begin], *copies, self.places[self.places >= end] + more]
        blocks = np.array(self.blocks or [""] * self.count, dtype=object)[order]
        return dataclasses.replace(
            self,
            names=tuple(f"{self.names[k]}#{at}" for at, k in enumerate(order)),
            **{name: getattr(self, name)[order] for name in ("work", "weights", "saved", "held")},
            ahead=np.append(self.ahead[order], 0.0),
            back=np.append(self.back[order], 0.0),
            hidden=np.append(self.hidden[order], 0.0),
            ties=tuple((a + more * (a >= end), b + more * (b >= end), nbytes) for a, b, nbytes in self.ties),
            places=np.concatenate(places),
            blocks=tuple(blocks),
        )


def chain(graph: Graph, level: str = "operator") -> Chain:
    """Of a graph. `level`: may it be cut at any operator where that can be of use, or between layers alone
    (`Node.block`)? ValueError for another word."""
    if level not in LEVELS:
        raise ValueError(f"level={level}: must be one of {', '.join(LEVELS)}")
    nodes = graph.operators
    place = {node.name: at for at, node in enumerate(nodes)}
    last = _last_readers(nodes, place)
    sizes = np.zeros((3, len(nodes) + 1))
    joined: set[int] = set()
    for node in nodes:
        begin, end = place[node.name], last.get(node.name, place[node.name])
        items = [
            place[each.name] for each in nodes[begin + 1 : end + 1] if each.target == ITEM and node.name in each.reads
        ]
        if items:  # several results: they stay with the operator, and are counted themselves
            joined.update(range(begin + 1, max(items) + 1))
        elif node.name not in graph.free and end > begin:
            sizes[0, begin + 1 : end + 1] += node.nbytes
            if node.name in graph.trained:
                sizes[1, begin + 1 : end + 1] += node.nbytes
            if node.name in graph.hidden and node.values[0].dtype == "float32":
                sizes[2, begin + 1 : end + 1] += node.nbytes
    weights, held = np.zeros(len(nodes)), np.zeros(len(nodes))
    ties: list[tuple[int, int, float]] = []
    kept = {**graph.constants, **graph.variables}
    readers: dict[str, int] = {}
    for at, node in enumerate(nodes):
        for key in node.tensors:
            if key in kept:
                held[at] += kept[key].nbytes * (key not in readers)
            else:
                weights[at] += graph.parameters[key].nbytes
                if key in readers:
                    ties.append((readers[key], at, float(graph.parameters[key].nbytes)))
            readers[key] = at
    work = np.array([node.flops for node in nodes])
    allowed = [at for at in range(1, len(nodes)) if at not in joined]
    if level == "layer":
        allowed = [at for at in allowed if nodes[at].block != nodes[at - 1].block]
    else:
        allowed = _worth(allowed, np.cumsum(work), np.cumsum(weights), sizes)
    return Chain(
        names=tuple(place),
        work=work,
        weights=weights,
        saved=np.array([float(node.saved) for node in nodes]),
        held=held,
        ahead=sizes[0],
        back=sizes[1],
        hidden=sizes[2],
        ties=tuple(ties),
        places=np.array([0, *allowed, len(nodes)], np.int64),
        blocks=tuple(node.block for node in nodes),
        tokens=_tokens(graph),
    )


def _worth(allowed: Sequence[int], work: Numbers, weights: Numbers, sizes: Numbers) -> list[int]:
    """Without positions that another one is better than: between the two nothing is computed and no parameter is read,
    and over the other one no more goes, either way."""
    found: list[int] = []
    for _, group in itertools.groupby(allowed, key=lambda at: (work[at - 1], weights[at - 1])):
        kept: list[int] = []
        for at in sorted(group, key=lambda at: (sizes[0, at], sizes[1, at], at)):
            if all(sizes[1, other] > sizes[1, at] for other in kept):
                kept.append(at)
        found += sorted(kept)
    return found


def _last_readers(nodes: Sequence[Node], place: Mapping[str, int]) -> dict[str, int]:
    last: dict[str, int] = {}
    for at, node in enumerate(nodes):
        for name in node.reads:
            if name in place:
                last[name] = at
    return last


def _tokens(graph: Graph) -> int:
    """Elements of the first input, which of a language model are its tokens; of images, rows."""
    for node in graph.nodes:
        if node.kind == "placeholder" and node.values:
            value = node.values[0]
            whole = value.dtype.startswith(("int", "uint"))
            return int(np.prod(value.shape)) if whole else int(value.shape[0])
    return 1
