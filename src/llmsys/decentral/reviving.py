"""Stages that nobody has any more are computed again.

One provider gets an older copy of a lost stage, what its neighbours had sent it since, and the job's own inputs,
and ends where the stage had been, while the others do nothing again (Swift, arXiv 2302.06173).
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping

from llmsys.decentral.broker import State
from llmsys.decentral.copies import Copies
from llmsys.decentral.cutting import Cutting, lost, neighbours
from llmsys.decentral.handing import Handing
from llmsys.decentral.saying import Tell
from llmsys.decentral.training import Update
from llmsys.decentral.whereabouts import JobLost, Whereabouts, owners, trusted
from llmsys.decentral.wire import BROKER


class Reviving:
    """`updates` of committed steps."""

    def __init__(self, where: Whereabouts, copies: Copies, handing: Handing, updates: Mapping[int, Update],
                 tell: Tell) -> None:  # fmt: skip
        self.where, self.copies, self.handing, self.updates, self._tell = where, copies, handing, updates, tell

    def begin(self, missing: Iterable[str], state: State) -> None:
        """Has the stages computed again that have these names. JobLost where no copies of them are left."""
        base, told, until = self.where.base, self.where.told, state.step
        assert base is not None, "a step has been committed"
        wanted = [at for at in lost(base, missing) if at not in told.reviving]
        if not wanted:
            return
        every, kept, after = self._from_where(base, {*wanted, *told.reviving}, until)
        who = {at: self._reviver(base, at, state) for at in every}
        programs = {at: self.handing.programs(who[at], base, at, state) for at in every}
        if None in programs.values():
            told.waiting = True
            return
        resending = {at: self._resending(base, at, every) for at in every}
        for at in every:
            self._tell(
                who[at],
                "revive",
                body={
                    **self.handing.described(base, at),
                    "cutting": base.number,
                    "after": after,
                    "until": until,
                    "updates": [[self.updates[s].rate, self.updates[s].scale] for s in range(after + 1, until + 1)],
                    "peers": {str(other): name for other, name in who.items()},
                    "near": {str(other): name for other, name in resending[at].items()},
                    "giver": _giver(who[at], kept[at][after]),
                },
                tensors=programs[at],
            )
            self._copy(base, at, after, who[at], kept[at][after])
        told.reviving = who
        for at in every:
            for step in range(after + 1, until + 1):
                self.handing.inputs(who[at], base, at, step)
            for other, name in resending[at].items():
                between = {"cutting": base.number, "stage": other, "for": at, "after": after, "until": until}
                self._tell(name, "resend", body={**between, "who": who[at]})

    def _copy(self, base: Cutting, at: int, after: int, name: str, kept_by: Collection[str]) -> None:
        """To whoever computes a stage again, the state from which it begins."""
        copy, giver = {"copy": [base.number, at]}, _giver(name, kept_by)
        state = self.handing.constants(base, at, self.where.told.holds.get(name, ()))
        if giver == BROKER:
            state |= self.copies.kept.copies[base.number, at][after]
        if state:
            self.handing.over(name, state, copy, after)
        if giver not in (BROKER, name):
            self._tell(giver, "give", step=after, body={**copy, "who": name})

    def _from_where(
        self, base: Cutting, lost: Collection[int], until: int
    ) -> tuple[list[int], dict[int, dict[int, set[str]]], int]:
        """Which stages to compute again, who keeps copies of them, by step, and the step from which all of them begin.
        A neighbour that has its state from elsewhere, and not what it has sent since that step, is one of them.
        JobLost where there is no such step."""
        told, every = self.where.told, set(lost)
        while True:
            kept = {
                at: {
                    step: there
                    for step, who in told.copies.get((base.number, at), {}).items()
                    if (there := who & set(told.holds))
                }
                for at in sorted(every)
            }
            common = set.intersection(*(set(each) for each in kept.values()))
            if not common:
                raise JobLost(
                    f"step {until}: stages {sorted(every)} are lost, and nobody has what they are computed again from"
                )
            after = max(common)
            near = {other for at in every for other in neighbours(base, at)} - every
            late = {other for other in near if told.since.get((base.number, other), until + 1) > after}
            if not late:
                return sorted(every), kept, after
            every |= late

    def _reviver(self, base: Cutting, at: int, state: State) -> str:
        """The owner that has most use for what a stage had."""
        order, names, hidden = owners(state), self.where.now.names, base.is_private(at)
        may = [index for index, name in enumerate(order) if not hidden or trusted(name, state)]
        return order[max(may, key=lambda index: len(names[index] & base.names[at]))]

    def _resending(self, base: Cutting, at: int, every: Collection[int]) -> dict[int, str]:
        """Of its neighbours those that are there, and by whom."""
        return {other: self.where.told.stages[base.number, other] for other in neighbours(base, at) - set(every)}


def _giver(name: str, kept_by: Collection[str]) -> str:
    """Of those who keep a copy who gives it to somebody: itself, or the broker where nobody else can."""
    return name if name in kept_by else min(set(kept_by) - {BROKER}, default=BROKER)
