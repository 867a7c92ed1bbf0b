"""What a provider has: the state of stages, and copies of others' that it keeps."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from llmsys.decentral.planes import CONSTANT, PARAMETER, names_of
from llmsys.decentral.stage_work import StageWork
from llmsys.decentral.wire import Array

CHUNK_BYTES = 1 << 20
"""State goes in frames of about as much, between which others find their way."""
PARTIAL = 8
"""Copies of a stage of which pieces are missing, at most."""
Place = tuple[int, int]
"""A stage for good: the epoch in which the model was cut like this, and the stage's number."""


@dataclass(kw_only=True)
class Held:
    """A stage whose state is here as it is after step `at`, and what it has sent after step `since`; `due`: parameters
    that others own, whose values have not come yet."""

    work: StageWork
    at: int
    since: int
    due: set[str] = field(default_factory=set)

    @property
    def names(self) -> list[str]:
        """Of its state."""
        return names_of(self.work.stage, self.work.rules)

    @property
    def lacks(self) -> set[str]:
        """Names of its state that are not here."""
        return self.due | self.work.executor.missing

    def applied(self) -> None:
        self.at += 1
        self.due = {PARAMETER + key for key in self.work.stage.shares}

    def settled(self) -> bool:
        """Whether nothing is due any more."""
        if self.due and self.work.settle(self.at):
            self.due = set()
        return not self.due

    def put(self, state: Mapping[str, Array]) -> None:
        """What it lacks, of what has come."""
        lacks = self.lacks
        self.work.executor.put({name: each for name, each in state.items() if name in lacks})
        self.due -= set(state)


@dataclass(kw_only=True)
class Holdings:
    """`stages`; `copies` by stage and step; `constants` of any stage, by name, as long as the job goes on;
    `partial`: copies of which some is here, by piece."""

    stages: dict[Place, Held] = field(default_factory=dict)
    copies: dict[Place, dict[int, dict[str, Array]]] = field(default_factory=dict)
    constants: dict[str, Array] = field(default_factory=dict)
    partial: dict[tuple[Place, int], dict[int, dict[str, Array]]] = field(default_factory=dict)

    def keep(
        self, place: Place, step: int, state: Mapping[str, Array], nbytes: Mapping[str, int], *, piece: int, of: int
    ) -> bool:
        """A piece of somebody's copy, one of so many; whether it is whole now. One that is not is none. `nbytes`: of
        the stage's state, by name. ValueError for what is not of it, or is larger, for a name in two pieces or in none,
        and for one more of a stage that has `PARTIAL` such."""
        if not 0 <= piece < of <= max(1, len(nbytes)):
            raise ValueError(f"a copy of stage {place} after step {step}: piece {piece} of {of}")
        for name, each in state.items():
            if len(each.data) > nbytes.get(name, -1):
                raise ValueError(f"a copy of stage {place}: {name[:64]}: is none of its names, or is larger")
        if (place, step) not in self.partial and sum(each == place for each, _ in self.partial) >= PARTIAL:
            raise ValueError(f"copies of stage {place}: {PARTIAL} are not whole")
        own = {at: part for at, part in self.partial.get((place, step), {}).items() if at != piece}
        if twice := set(state).intersection(*[{name for part in own.values() for name in part}]):
            raise ValueError(f"a copy of stage {place}: {min(twice)}: is in two pieces")
        own[piece] = {name: each for name, each in state.items() if not name.startswith(CONSTANT)}
        if set(own) != set(range(of)):
            self.partial[place, step] = own
            return False
        self.partial.pop((place, step), None)
        whole = {name: each for part in own.values() for name, each in part.items()}
        if lacking := {name for name in nbytes if not name.startswith(CONSTANT)} - set(whole):
            raise ValueError(f"a copy of stage {place}: {min(lacking)}: is in none of its pieces")
        self.copies.setdefault(place, {})[step] = whole
        return True

    def note(self, state: Mapping[str, Array], names: Collection[str]) -> None:
        """Keeps what of it is of a stage with these names, never changes, and is not here yet."""
        new = {name: each for name, each in state.items() if name.startswith(CONSTANT) and name in names}
        self.constants = {**new, **self.constants}

    def have(self, step: int) -> dict[str, Any]:
        """What the broker is told: stages as they are after `step`, what each has sent since when (-1: it is not here
        yet), and what it lacks; copies, and of which steps."""
        there = {place: held for place, held in self.stages.items() if held.at == step}
        since = {place: -1 if held.work.executor.missing else held.since for place, held in there.items()}
        return {
            "stages": [[*place, since[place], sorted(held.lacks)] for place, held in there.items()],
            "copies": [[*place, sorted(steps)] for place, steps in self.copies.items()],
            "constants": sorted(self.constants),
        }

    def there(self, wanted: set[str], step: int) -> dict[str, Array]:
        """Of these names, what is here as it is after `step`, in stages or in copies."""
        found = {name: each for name, each in self.constants.items() if name in wanted}
        for held in self.stages.values():
            if held.at == step:
                own = (wanted & set(held.names)) - held.lacks - set(found)
                found |= held.work.executor.state(sorted(own))
        for steps in self.copies.values():
            found |= {name: steps[step][name] for name in wanted - set(found) if name in steps.get(step, {})}
        return found

    def found(self, names: Sequence[str], step: int) -> dict[str, Array]:
        """All of these names. ValueError for one that is not here."""
        found = self.there(set(names), step)
        if lacking := set(names) - set(found):
            raise ValueError(f"state {min(lacking)}: is not here")
        return found

    def drop(self, before: int) -> None:
        """What is older is asked for no more: what was sent up to this step, and copies of earlier ones."""
        for held in self.stages.values():
            held.work.drop(before)
            held.since = max(held.since, before)
        left = {p: {at: each for at, each in steps.items() if at >= before} for p, steps in self.copies.items()}
        self.copies = {place: steps for place, steps in left.items() if steps}


def chunks(state: Mapping[str, Array]) -> Iterator[dict[str, Array]]:
    """At least one."""
    piece: dict[str, Array] = {}
    size = 0
    for name, array in state.items():
        if piece and size + len(array.data) > CHUNK_BYTES:
            yield piece
            piece, size = {}, 0
        piece[name] = array
        size += len(array.data)
    yield piece
