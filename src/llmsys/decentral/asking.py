"""Who is asked to compute again what somebody else has computed, and what they are told for it."""

from __future__ import annotations

import random
from dataclasses import dataclass, field
from typing import Any

from llmsys.decentral.broker import State
from llmsys.decentral.cost import GIB
from llmsys.decentral.cutting import neighbours
from llmsys.decentral.holdings import Place
from llmsys.decentral.planes import Arrays
from llmsys.decentral.recovery import Recovery
from llmsys.decentral.saying import Tell
from llmsys.decentral.whereabouts import owners, trusted

WAIT_S, SLOWER = 30.0, 20
"""Somebody who is asked has so long, and so many times what computing and the copy's way take by the plan."""


@dataclass(kw_only=True)
class Check:
    """Of the steps after `after` up to `until` of a stage: `copy`, its state before them; `account`: what its `owner`
    has said of them; `opinions`: others, by name. Of those who were `tried`, `asked` is the one who is to answer before
    `by_s`, in `epoch`; `near` had the neighbours."""

    place: Place
    owner: str
    after: int
    until: int
    copy: Arrays
    account: dict[str, Any]
    opinions: dict[str, dict[str, Any]] = field(default_factory=dict)
    tried: set[str] = field(default_factory=set)
    asked: str = ""
    epoch: int = 0
    by_s: float = 0.0
    near: dict[int, str] = field(default_factory=dict)

    def __str__(self) -> str:
        return f"stage {self.place[1]}, steps {self.after + 1} to {self.until}"


class Asking:
    """Of what `recovery` knows. `stacks` that providers say they have, by name."""

    def __init__(self, recovery: Recovery, tell: Tell) -> None:
        self.recovery, self._tell = recovery, tell
        self.draws: random.Random = random.SystemRandom()
        self.stacks: dict[str, str] = {}

    def other(self, check: Check, state: State) -> str | None:
        """Anybody who has not been asked, may see the stage and has room for it: of the pool, before owners of other
        stages, before its neighbours, who are the last to be asked."""
        order, at, where = owners(state), check.place[1], self.recovery.where
        hidden, near, costs = where.now.is_private(at), neighbours(where.now, at), state.costs
        sizes = [
            costs.device_bytes(begin, end, costs.work.in_flight(len(order) - 1 - stage))
            for stage, (begin, end) in enumerate(zip(where.now.cuts, where.now.cuts[1:], strict=False))
        ]
        groups: dict[int, list[str]] = {}
        for name in sorted(state.present - check.tried - {check.owner, order[at]}):
            place, own = state.place(name), order.index(name) if name in order else None
            assert place is not None
            room = state.providers[place].mem_gib * GIB - (0 if own is None else sizes[own])
            same = self.stacks.get(name) == self.stacks[check.owner]
            if same and sizes[at] <= room and (trusted(name, state) or not hidden):
                groups.setdefault(0 if own is None else 2 if own in near else 1, []).append(name)
        return self.draws.choice(groups[min(groups)]) if groups else None

    def ask(self, check: Check, name: str, state: State, now: float | None) -> None:
        """`now` None: of whom was asked before, and has as long as it had."""
        where, handing, updates = self.recovery.where, self.recovery.handing, self.recovery.updates
        cutting, (number, at), steps = where.now, check.place, range(check.after + 1, check.until + 1)
        order, nbytes = owners(state), sum(len(each.data) for each in check.copy.values())
        check.asked, check.epoch = name, state.epoch
        check.near = {other: order[other] for other in neighbours(cutting, at)}
        check.tried.add(name)
        if now is not None:
            place = state.place(name)
            assert place is not None
            assert state.plan is not None
            takes_s = len(steps) * state.plan.score.step_s + nbytes * 8e-6 / state.providers[place].down_mbit
            check.by_s = now + WAIT_S + SLOWER * takes_s
        between = {"cutting": number, "after": check.after, "until": check.until}
        body = {
            **handing.described(cutting, at),
            **between,
            "updates": [[updates[step].rate, updates[step].scale] for step in steps],
            "near": {str(other): who for other, who in check.near.items()},
        }
        self._tell(name, "check", body=body)
        new = handing.constants(cutting, at, self.recovery.told.holds.get(name, ()))
        handing.over(name, {**check.copy, **new}, {"check": [number, at]}, check.after)
        for step in steps:
            handing.inputs(name, cutting, at, step)
        for other, who in check.near.items():
            self._tell(who, "resend", body={**between, "stage": other, "for": at, "who": name})
