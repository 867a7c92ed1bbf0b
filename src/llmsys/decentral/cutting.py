"""A model cut for the providers of a plan: what each stage is, and whose state has which names."""

from __future__ import annotations

import functools
from collections.abc import Iterable, Mapping
from dataclasses import dataclass

from llmsys.decentral.chain import Chain
from llmsys.decentral.compression import Codecs
from llmsys.decentral.cut import Stage, cut, part
from llmsys.decentral.graph import Graph
from llmsys.decentral.planes import Rules, names_of, value_of


@dataclass(frozen=True, eq=False)
class Cutting:
    """Of `graph`, at positions `cuts` of its chain; made in epoch `number`, by which it is called. `codecs` of what its
    stages send, as long as it is cut like this: what is sent again is sent as it was. `private` operators, the first
    and the last so many."""

    number: int
    graph: Graph
    chain: Chain
    cuts: tuple[int, ...]
    rules: Rules
    codecs: Codecs
    private: tuple[int, int]

    @functools.cached_property
    def stages(self) -> tuple[Stage, ...]:
        return cut(self.graph, self.chain.at(self.cuts[1:-1]))

    @functools.cached_property
    def parts(self) -> tuple[Graph, ...]:
        """What of the graph each stage's provider has to know."""
        return tuple(part(self.graph, stage) for stage in self.stages)

    def noisy(self, index: int) -> list[str]:
        """Hidden states that a private stage sends to one that anybody may have, whoever has it now: who takes it over
        is sent them again."""
        own = self.stages[index]
        if not self.is_private(index):
            return []
        return [name for name, to in own.sends.items() if name in own.hidden and not self.is_private(to)]

    def is_private(self, index: int) -> bool:
        """Whether a stage has operators that only trusted providers may see."""
        first, last = self.private
        return self.cuts[index] < first or self.cuts[index + 1] > self.chain.count - last

    @functools.cached_property
    def names(self) -> tuple[frozenset[str], ...]:
        """Of each stage's state."""
        return tuple(frozenset(names_of(stage, self.rules)) for stage in self.stages)

    @functools.cached_property
    def nbytes(self) -> tuple[dict[str, int], ...]:
        """The same, with the bytes of each."""
        return tuple(
            {name: value_of(own, name, self.rules).nbytes for name in names_of(stage, self.rules)}
            for stage, own in zip(self.stages, self.parts, strict=True)
        )


def lost(cutting: Cutting, missing: Iterable[str]) -> list[int]:
    """The fewest stages, taken greedily, whose state has all these names. ValueError for one that no stage has."""
    left, found = set(missing), list[int]()
    while left:
        best = max(range(len(cutting.names)), key=lambda at: (len(cutting.names[at] & left), -at))
        if not cutting.names[best] & left:
            raise ValueError(f"state {min(left)}: no stage has it")
        found.append(best)
        left -= cutting.names[best]
    return sorted(found)


def sources(wanted: Iterable[str], holders: Mapping[str, frozenset[str]]) -> dict[str, list[str]]:
    """Who gives which of these names: each is asked for what nobody before it has; whoever has most comes first."""
    left, found = set(wanted), dict[str, list[str]]()
    while left:
        name = max(sorted(holders), key=lambda each: len(holders[each] & left), default="")
        if not name or not holders[name] & left:
            break
        found[name] = sorted(holders[name] & left)
        left -= holders[name]
    return found


def neighbours(cutting: Cutting, at: int) -> set[int]:
    """Stages that send something to this one."""
    own = cutting.stages[at]
    shared = {other.index for other in cutting.stages if at in {t for to in other.tells.values() for t in to}}
    return {*own.receives.values(), *own.sends.values(), *own.hears.values()} | shared
