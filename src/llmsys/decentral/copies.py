"""Who keeps copies of whose state, and of which step: what a stage that is lost is computed again from.

No step begins before whatever stage may be lost next could be: of some step there is a copy of each with somebody else
than its owner, and all that was sent since is still there.
"""

from __future__ import annotations

import collections
import math
from collections.abc import Collection, Mapping, Sequence

from llmsys.decentral.broker import State
from llmsys.decentral.cutting import Cutting
from llmsys.decentral.holdings import Holdings, Place
from llmsys.decentral.planes import CONSTANT, value_of
from llmsys.decentral.saying import Tell
from llmsys.decentral.training import Training
from llmsys.decentral.whereabouts import Whereabouts, owners, trusted
from llmsys.decentral.wire import BROKER, Frame

COPYING = 0.5
MOST_BETWEEN = 64
ON_THEIR_WAY, LOST = 2, 16
"""Steps whose copies are, at most: what is sent faster than a line carries it would fill its sender's memory; and so
many times `every` steps later what has not come is lost."""


def copies_every(state: State, cutting: Cutting, keepers: Mapping[str, Sequence[str]]) -> int:
    """Steps between two copies of the stages' state, so that no line, of those who send them and of those who keep
    them, is busy with them for more than `COPYING` of the time; in between neighbours keep what they have sent, from
    which a lost stage is computed again. The broker's own line is taken for one that is never full."""
    assert state.plan is not None
    (pipeline,) = state.plan.pipelines
    sent, kept = collections.Counter[str](), collections.Counter[str]()
    for p, each in zip(pipeline.order, cutting.nbytes, strict=True):
        nbytes = sum(count for name, count in each.items() if not name.startswith(CONSTANT))
        owner = state.providers[p].name
        for keeper in keepers.get(owner, ()):
            sent[owner] += nbytes
            kept[keeper] += nbytes
    lines = {each.name: each for each in state.providers}
    busy_s = [nbytes * 8e-6 / lines[name].up_mbit for name, nbytes in sent.items()]
    busy_s += [nbytes * 8e-6 / lines[name].down_mbit for name, nbytes in kept.items() if name != BROKER]
    return max(1, min(MOST_BETWEEN, math.ceil(max(busy_s, default=0.0) / (COPYING * state.plan.score.step_s))))


class Copies:
    """Of the stages of `where`. `keepers` of each owner's; `kept`: the broker's own. Nobody
    asks to compute a lost stage again from what is older than step `safe`;
    checks do, from step `wanted` on."""

    def __init__(self, training: Training, where: Whereabouts, tell: Tell) -> None:
        self.training, self.where, self._tell = training, where, tell
        self.keepers: dict[str, list[str]] = {}
        self.kept = Holdings()
        self.wanted: int | None = None
        self.safe = 0
        self.every = 1
        self._sent: list[int] = []  # steps of which copies are on their way, as far as is known

    # --- a plan ---

    def plan(self, state: State) -> None:
        """A new epoch begins: who keeps what now, and what the broker itself has, as providers say what they have."""
        self.keepers = self.keepers_of(state)
        self.every = self.training.copy_every or copies_every(state, self.where.now, self.keepers)
        self._sent.clear()
        told = self.where.told
        self.kept.partial.clear()
        for place, steps in self.kept.copies.items():
            for step in steps:
                told.copies.setdefault(place, {}).setdefault(step, set()).add(BROKER)
        told.holds[BROKER] = {name for steps in self.kept.copies.values() for name in steps.get(state.step, ())}

    def keepers_of(self, state: State) -> dict[str, list[str]]:
        """Of each owner, who keep its copies: first those in the pool, who may take one over; and the broker."""
        order = owners(state)
        spares = sorted(state.present - set(order))
        found = {}
        for at, name in enumerate(order):
            turned = [*spares[at % max(1, len(spares)) :], *spares[: at % max(1, len(spares))]]
            others = [*turned, *order[at + 1 :], *order[:at]]
            if self.where.now.is_private(at):
                others = [each for each in others if trusted(each, state)]
            found[name] = [each for each in others if each in state.present][: self.training.copies]
            found[name] += [BROKER] if self.training.owner_keeps else []
        return found

    def kept_by_others(self, state: State) -> None:
        """Where somebody who kept copies has gone."""
        keepers = self.keepers_of(state)
        if keepers == self.keepers:
            return
        self.keepers, self.where.told.copying = keepers, False
        order = owners(state)
        for name in sorted(state.present):
            self._tell(name, "keepers", body={"keepers": keepers.get(name, []), "keeps": self.keeps(name, order)})

    def keeps(self, name: str, order: Sequence[str]) -> dict[str, tuple[str, dict[str, int]]]:
        """Of which stages somebody keeps copies, who has these, and what is in them."""
        nbytes = self.where.now.nbytes
        return {str(at): (owner, nbytes[at]) for at, owner in enumerate(order) if name in self.keepers[owner]}

    # --- what comes ---

    def keep(self, frame: Frame, state: State) -> None:
        """A piece of a copy that the broker keeps: the last that is left, whoever goes. ValueError where it is not from
        the stage's owner, is older than one that is here, or is not as the graph says."""
        place = (int(frame.body["keep"][0]), int(frame.body["keep"][1]))
        self._theirs(place, frame, state, [frame.sender])
        piece, of = int(frame.body["piece"]), int(frame.body["of"])
        nbytes, part = self.where.now.nbytes[place[1]], self.where.now.parts[place[1]]
        if frame.step < max(self.kept.copies.get(place, {}), default=0):
            raise ValueError(f"a copy of stage {place} after step {frame.step}: one of a later step is here")
        for name, array in frame.tensors.items():
            value = value_of(part, name, self.where.now.rules) if name in nbytes else None
            if value is None or (array.dtype, array.shape) != (value.dtype, value.shape):
                raise ValueError(f"a copy of stage {place}: {name}: is none of its names, or is another")
        if self.kept.keep(place, frame.step, frame.tensors, nbytes, piece=piece, of=of):
            self._copied(place, frame.step, BROKER)

    def copied(self, frame: Frame, state: State) -> None:
        """Somebody keeps a copy. ValueError where it is not theirs to keep, or of a step that is none."""
        place = (int(frame.body["cutting"]), int(frame.body["stage"]))
        self._theirs(place, frame, state, [name for name, keep in self.keepers.items() if frame.sender in keep])
        self._copied(place, frame.step, frame.sender)

    def _theirs(self, place: Place, frame: Frame, state: State, names: Collection[str]) -> None:
        """ValueError where none of `names` has that stage, or the step has not been committed."""
        order, cutting = owners(state), self.where.cutting
        there = cutting is not None and place[0] == cutting.number and 0 <= place[1] < len(order)
        if not there or order[place[1]] not in names or not 0 <= frame.step <= state.step:
            raise ValueError(f"a copy of stage {place} as it is after step {frame.step}: is not theirs")

    def _copied(self, place: Place, step: int, who: str) -> None:
        self.where.told.copies.setdefault(place, {}).setdefault(step, set()).add(who)

    # --- a step ---

    def guarded(self, state: State) -> bool:
        """Whether whatever stage is lost could be computed again. Alone there is nobody else, and without copies nobody
        would keep one. The broker has one of each before, too, where it keeps any, so that all may go. Asks for copies
        where they are needed."""
        told = self.where.told
        last_left = not self.training.owner_keeps or bool(self.common_here())
        if not any(self.keepers.values()) or (last_left and self._common(state) is not None):
            return True
        if not told.copying:
            told.copying = True
            for name in owners(state):
                self._tell(name, "copy")
        return False

    def begin(self, state: State) -> int:
        """A step begins: nobody asks any more for what is older than the step that is returned. It goes here, too."""
        self.safe = max(self.safe, self._common(state) or 0)
        safe = self.safe if self.wanted is None else min(self.safe, self.wanted)
        number, told = self.where.now.number, self.where.told
        self.kept.copies = {place: own for place, own in self.kept.copies.items() if place[0] == number}
        if own := self.common_here():
            self.kept.drop(max(own))
        told.since = {place: max(since, safe) for place, since in told.since.items()}
        return safe

    def due(self, state: State) -> bool:
        """A step begins: whether owners are to send copies of what it leaves. Each `every`-th time, unless those before
        are late."""
        step = state.step + 1
        late = step - LOST * self.every
        self._sent = [at for at in self._sent if at > late and not self._arrived(at, state)]
        if step % self.every or len(self._sent) >= ON_THEIR_WAY:
            return False
        self._sent.append(step)
        return True

    def _arrived(self, step: int, state: State) -> bool:
        there, copies = state.present | {BROKER}, self.where.told.copies
        return all(
            copies.get(place, {}).get(step, set()) >= there.intersection(self.keepers.get(owner, ()))
            for place, owner in zip(self.where.places, owners(state), strict=True)
        )

    def common_here(self) -> set[int]:
        """Steps of which the broker itself has all stages, as the model is cut now."""
        return set.intersection(*(set(self.kept.copies.get(place, {})) for place in self.where.places))

    def _common(self, state: State) -> int | None:
        """The last step of which all these stages, as the model is cut now, have copies with others that are there,
        and that no owner of the others has begun after."""
        told, places = self.where.told, self.where.places
        steps = [
            {
                at
                for at, who in told.copies.get(place, {}).items()
                if who & (state.present | {BROKER}) - {owner}
            }
            for place, owner in zip(places, owners(state), strict=True)
        ]  # fmt: skip
        since = max((told.since.get(place, state.step) for place in places), default=0)
        return max((at for at in set.intersection(*steps) if at >= since), default=None)
