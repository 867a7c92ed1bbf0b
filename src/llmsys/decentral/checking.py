"""Spot checks: what an owner has computed of its stage is computed again by somebody else, and compared.

Between two copies of a stage's state that the broker keeps there are some steps: with a chance of `Training.checks`
they are checked, by a draw of the system's that is made when they are over, so that nobody can know before. A provider
begins with the first copy, gets what the neighbours had sent in these steps, and says what it was sent, what it would
have sent (`claims`), its losses and the squares of its gradients, and what the state is then. The owner has said all
that before the draw: of each step when it was over; of the state by the second copy. So a check is of forward,
backward and update, and costs their computing once more.

Where two do not say the same a third one is asked, and whoever is alone with what it says is sent away. Bits are the
same on the same stack alone (`Plane.stack`): others are neither checked nor asked.
"""

from __future__ import annotations

import collections
from collections.abc import Iterable, Mapping
from typing import Any

from llmsys.decentral.asking import Asking, Check
from llmsys.decentral.broker import State
from llmsys.decentral.claims import hashed
from llmsys.decentral.cutting import neighbours
from llmsys.decentral.holdings import Place
from llmsys.decentral.recovery import Recovery
from llmsys.decentral.saying import Tell
from llmsys.decentral.whereabouts import JobLost, owners
from llmsys.decentral.wire import Frame


class Cheated(JobLost):
    """What has been computed is not what should have been."""


class Checking:
    """Of what `recovery` knows. Counted in steps of a stage: `checked`, by owner, and
    `unchecked`, which were drawn and could not be. `cheats`: who was wrong, and why. `doubtful`: the first step after
    which the model is not to be trusted; `verdicts`: all that was found, in words."""

    def __init__(self, recovery: Recovery, tell: Tell) -> None:
        self.recovery, self.training, self._tell = recovery, recovery.training, tell
        self.checked, self.unchecked = collections.Counter[str](), 0
        self.cheats: dict[str, str] = {}
        self.undecided = 0
        self.doubtful: int | None = None
        self.verdicts: list[str] = []
        self._told = (0, 0, 0)  # what is in the log: verdicts, and steps that were checked, or were not
        self.open: dict[Place, Check] = {}
        self.asking = Asking(recovery, tell)
        self._said: dict[tuple[Place, int, str], dict[str, Any]] = {}  # of a step, by its owner: before the commit
        self._claims: dict[tuple[Place, int, str], dict[str, Any]] = {}  # the same, after it
        self._givers: dict[tuple[Place, int], str] = {}  # of copies that the broker has
        self._cutting, self._after, self._compared = -1, 0, 0
        self._epoch = self._ending = -1  # in which owners were asked for copies

    def counts(self) -> dict[str, int]:
        """For a record."""
        found = {"checked": self.checked.total(), "unchecked": self.unchecked, "cheats": len(self.cheats)}
        return {**found, "undecided": self.undecided}

    def news(self) -> dict[str, Any]:
        """What was found since it was last asked for, for the log; empty where that is nothing."""
        before, now = self._told, (len(self.verdicts), self.checked.total(), self.unchecked)
        if now == before:
            return {}
        self._told = now
        own = {"cheats": {**self.cheats}, "undecided": self.undecided, "doubtful": self.doubtful}
        return {**own, "verdicts": self.verdicts[before[0] :], "checked": {**self.checked}, "unchecked": self.unchecked}

    def rebuild(self, found: Mapping[str, Any]) -> None:
        """As it was that found this."""
        self.cheats, self.undecided = dict(found["cheats"]), found["undecided"]
        self.doubtful, self.unchecked = found["doubtful"], found["unchecked"]
        self.checked = collections.Counter(found["checked"])
        self.verdicts += found["verdicts"]
        self._told = (len(self.verdicts), self.checked.total(), self.unchecked)

    # --- what comes ---

    def have(self, frame: Frame) -> None:
        """What a provider computes with."""
        self.asking.stacks[frame.sender] = str(frame.body.get("stack", ""))[:200]

    def prepared(self, frame: Frame, state: State) -> None:
        """An owner's losses and squares of gradients."""
        if self.training.checks and frame.step == state.step + 1:
            body = {key: frame.body[key] for key in ("squares", "results")}
            self._said[self._place(frame, state), frame.step, frame.sender] = body

    def held(self, frame: Frame, state: State) -> None:
        """An owner's claims of the step that it has applied last; what it has said first counts."""
        claim, key = frame.body.get("claim"), (self._place(frame, state), frame.step, frame.sender)
        if frame.step == state.step and key in self._said and isinstance(claim, Mapping) and _good(claim):
            self._claims.setdefault(key, {**claim, **self._said[key]})

    def copied(self, frame: Frame) -> None:
        """An owner's copy, for the broker."""
        if not self.training.checks:
            return  # nobody asks for it, and nothing would be forgotten
        self._givers[(int(frame.body["keep"][0]), int(frame.body["keep"][1])), frame.step] = frame.sender

    def opinion(self, frame: Frame) -> None:
        """Of somebody who was asked. ValueError where it was not."""
        body, place = frame.body, (int(frame.body["cutting"]), int(frame.body["stage"]))
        check = self.open.get(place)
        if check is None or check.asked != frame.sender:
            raise ValueError(f"an opinion of stage {place}: was not asked for")
        check.asked = ""
        if "why" in body:
            self.verdicts.append(f"{check}: {frame.sender} cannot compute it again: {str(body['why'])[:200]}")
            return
        steps = body.get("steps")
        good = isinstance(steps, list) and len(steps) == check.until - check.after and all(map(_good, steps))
        found = {"steps": steps, "state": body.get("state")} if good else {"steps": [], "state": frame.sender}
        check.opinions[frame.sender] = found
        self._judge(check)

    def _place(self, frame: Frame, state: State) -> Place:
        return self.recovery.where.now.number, owners(state).index(frame.sender)

    # --- what follows ---

    def step(self, state: State, now: float) -> None:
        """A step is about to begin, or was the last: what is to be checked of those before it is drawn, and who is
        to do it is told. Nobody has dropped anything yet of what they need for it."""
        if not self.training.checks:
            return
        where, copies = self.recovery.where, self.recovery.copies
        newest = max(copies.common_here(), default=None)
        if where.now.number != self._cutting:
            self._cutting, self._after = where.now.number, state.step if newest is None else newest
            self._compared = self._after
        self._compare(state)
        for check in [*self.open.values()]:
            self._go_on(check, state, now)
        if newest is not None and newest > self._after:
            for at in range(len(where.now.stages)):
                if self.asking.draws.random() < self.training.checks:
                    self._begin(at, newest, state, now)
            self._after = newest
        for kept in (self._said, self._claims):
            for key in [key for key in kept if key[0][0] != self._cutting or key[1] <= self._after]:
                del kept[key]
        self._givers = {key: name for key, name in self._givers.items() if key[1] >= self._after}
        copies.wanted = min([self._after, *(each.after for each in self.open.values())])
        if self._epoch != state.epoch:  # who has a stage now has not computed what came before
            self._epoch = state.epoch
            self._ask_for_copies(state)

    def over(self, state: State, now: float) -> bool:
        """After the last step: whether all checks are. The broker needs a copy of it."""
        if not self.training.checks:
            return True
        if state.step not in self.recovery.copies.common_here():
            if self._ending != state.epoch:
                self._ending = state.epoch
                self._ask_for_copies(state)
            return False
        if self.open:  # or there would be none of their stages' last steps
            for check in [*self.open.values()]:
                self._go_on(check, state, now)
        else:
            self.step(state, now)
        return not self.open

    def _ask_for_copies(self, state: State) -> None:
        for name in owners(state):
            self._tell(name, "copy")

    def unfit(self, state: State) -> dict[str, str]:
        """Of those who are there, who were found out."""
        return {name: why for name, why in self.cheats.items() if name in state.present}

    def _begin(self, at: int, until: int, state: State, now: float) -> None:
        """A check, where all that it needs is there."""
        place, owner, after = (self._cutting, at), owners(state)[at], self._after
        kept = self.recovery.copies.kept.copies.get(place, {})
        given = all(self._givers.get((place, step)) == owner and step in kept for step in (after, until))
        steps = range(after + 1, until + 1)
        claimed = all(
            ((self._cutting, each), step, owners(state)[each]) in self._claims
            for each in (at, *neighbours(self.recovery.where.now, at))
            for step in steps
        )
        if place in self.open or not given or not claimed or not self.asking.stacks.get(owner):
            self.unchecked += until - after
            return
        told = {"steps": [self._claims[place, step, owner] for step in steps], "state": hashed(kept[until])}
        check = Check(place=place, owner=owner, after=after, until=until, copy=kept[after], account=told)
        self.open[place] = check
        self._go_on(check, state, now)

    def _go_on(self, check: Check, state: State, now: float) -> None:
        """Asks whoever is to be asked next, if anybody is; in a new epoch the same one anew."""
        same = check.epoch == state.epoch
        if check.asked in state.present and same and now <= check.by_s:
            return
        if check.place[0] != self._cutting or self._late(check, state):
            return self._given_up(check, "what it was computed from is gone")
        again = check.asked in state.present and now <= check.by_s
        name = check.asked if again else self.asking.other(check, state)
        if name is None:
            return self._given_up(check, "there is nobody with the same stack, and room, who could be asked")
        self.asking.ask(check, name, state, None if again else now)

    def _late(self, check: Check, state: State) -> bool:
        """Whether somebody has a neighbour now who has not all that it had sent."""
        near, since = neighbours(self.recovery.where.now, check.place[1]), self.recovery.told.since
        return any(since.get((self._cutting, other), state.step) > check.after for other in near)

    def _given_up(self, check: Check, why: str) -> None:
        del self.open[check.place]
        if check.opinions:
            names = [check.owner, *check.opinions]
            self._undecided(names, f"{check}: they do not say the same, and {why}", check.after)
        else:
            self.unchecked += check.until - check.after

    # --- what comes of it ---

    def _judge(self, check: Check) -> None:
        """By two who say the same."""
        first, *more = check.opinions
        own, said = check.account, check.opinions[first]
        if not more and said != own:
            self.verdicts.append(f"{check}: {check.owner} and {first} do not say the same: somebody else is asked")
            return
        del self.open[check.place]
        if not more or check.opinions[more[0]] == own:
            self.checked[check.owner] += check.until - check.after
            if more:
                self._found(first, f"{check}: {check.owner} and {more[0]} say the same, and {first} does not")
        elif check.opinions[more[0]] == said:
            self.checked[check.owner] += check.until - check.after
            self._other_than(check, said, f"{first} and {more[0]} say the same, and")
        else:
            self._undecided([check.owner, *check.opinions], f"{check}: all three say something else", check.after)

    def _other_than(self, check: Check, said: Mapping[str, Any], so: str) -> None:
        """Two others agree: the owner was wrong; unless they were sent something else than it had been, when its
        neighbour had said the same as it did (`_compare`)."""
        step = check.after
        for own, other in zip(check.account["steps"], said["steps"], strict=True):
            step += 1
            for stage, name in check.near.items():
                if own["came"].get(str(stage)) != other["came"].get(str(stage)):
                    return self._found(name, f"{check}: {name} has sent something else when it was asked again")
            for stage, name in check.near.items():
                tells = self.recovery.where.now.stages[stage].tells
                if any(own["values"].get(key) != other["values"].get(key) for key in tells if key in own["values"]):
                    return self._found(name, f"{check}: {name} has sent other values when it was asked again")
            if own != other:
                break
        why = f"{check}: {so} {check.owner} does not, first of step {step}"
        self._found(check.owner, why)
        self._doubt(check.after, why)

    def _compare(self, state: State) -> None:
        """What owners have said of each other: of each step, two neighbours of the same tensors the same."""
        order = owners(state)
        for step in range(self._compared + 1, state.step + 1):
            claims = [self._claims.get(((self._cutting, at), step, name), {}) for at, name in enumerate(order)]
            for at, own in enumerate(claims):
                for to, other in enumerate(claims):
                    if own and other and not _agree(own, other, at, to):
                        why = f"step {step}: {order[at]} says that it has sent something else than {order[to]} says"
                        self._undecided([order[at], order[to]], why, step - 1)
                        for each in (at, to):  # nor by what is computed again
                            self._claims.pop(((self._cutting, each), step, order[each]), None)
        self._compared = state.step

    def _found(self, name: str, why: str) -> None:
        self.cheats[name] = why
        self.verdicts.append(f"{name} is sent away: {why}")

    def _undecided(self, names: Iterable[str], why: str, after: int) -> None:
        self.undecided += 1
        text = f"{', '.join(names)}: {why}; one of them is wrong, and nobody can say which"
        self.verdicts.append(text)
        self._doubt(after, text)

    def _doubt(self, after: int, why: str) -> None:
        """Cheated where such a job is to stop."""
        self.doubtful = after if self.doubtful is None else min(after, self.doubtful)
        if self.training.on_cheat == "stop":
            raise Cheated(f"the model is not to be trusted after step {after}: {why}")


def _agree(own: Mapping[str, Any], other: Mapping[str, Any], at: int, to: int) -> bool:
    """Whether stage `to` says that it was sent what stage `at` says, and both have the same of what both have."""
    both = own["values"].keys() & other["values"].keys()
    same = all(own["values"][key] == other["values"][key] for key in both)
    return same and own["sent"].get(str(to)) == other["came"].get(str(at))


def _good(claim: Any) -> bool:
    """Whether it has hashes by stage, and by name."""
    keys = ("came", "sent", "values")
    return isinstance(claim, Mapping) and all(isinstance(claim.get(key), Mapping) for key in keys)
