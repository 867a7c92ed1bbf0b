"""What each provider has done for a job: what a reward could be shared out by.

All of it is what the broker knows by itself: plans and committed steps, which are in its log, and bytes that it has
passed on (`traffic`); nothing is what a provider says of itself. So a broker that dies counts on where it was.

A step counts for who had its stages when it was committed, and for nobody else: attempts that were given up are counted
apart and earn nothing, and neither does what is computed again of steps before, which somebody had been credited with.
FLOPs of all providers together are therefore those of the model times the steps that were committed.
"""

from __future__ import annotations

import collections
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from llmsys.decentral.chain import Chain
from llmsys.decentral.cost import Workload
from llmsys.decentral.events import Began, Committed, Event, Joined, Left, Lost, Planned
from llmsys.decentral.plan import Plan

FILE = "contributions.json"
MIB = 2**20


@dataclass(kw_only=True)
class Account:
    """Of a provider: tasks of committed steps (`forward` and `backward` passes of a micro-batch, `updates` of a step),
    and their FLOPs; `stages`: committed steps by the number of the stage that it had. `given_up`: attempts of steps in
    which it had one, and which came to nothing. `sent_bytes`: for other providers and for the broker's copies;
    `copies_bytes`: of others' state that it was given to keep. `present_s`: until the last event."""

    forward: int = 0
    backward: int = 0
    updates: int = 0
    flops: float = 0.0
    stages: collections.Counter[int] = field(default_factory=collections.Counter)
    given_up: int = 0
    sent_bytes: int = 0
    copies_bytes: int = 0
    present_s: float = 0.0


class Accounts:
    """Of a job of `work` on `chain`, by provider: the sum of its events, each noted once, in order."""

    def __init__(self, chain: Chain, work: Workload) -> None:
        self.work = work
        self.by_name: dict[str, Account] = {}
        self._flops = np.concatenate([[0.0], np.cumsum(chain.work)])  # forward, of a micro-batch, up to each position
        self._places: list[str] = []
        self._there: set[str] = set()
        self._plan: Plan | None = None
        self._under_way = False
        self._at_s = 0.0

    def note(self, event: Event, more: Mapping[str, Any]) -> None:
        """An event with what goes with it in the log."""
        for name in self._there:
            self.by_name[name].present_s += event.at_s - self._at_s
        self._at_s = event.at_s
        match event:
            case Joined(provider=provider):
                if provider.name not in self.by_name:
                    self.by_name[provider.name] = Account()
                    self._places.append(provider.name)
                self._there.add(provider.name)
            case Left(name=name) | Lost(name=name):
                self._there.discard(name)
            case Planned(plan=plan):
                if self._under_way:
                    for name, *_ in self._stages():
                        self.by_name[name].given_up += 1
                self._plan, self._under_way = plan, False
            case Began():
                self._under_way = True
            case Committed():
                self._under_way = False
                self._committed()
        for name, (sent, copies) in more.get("bytes", {}).items():
            self.by_name[name].sent_bytes += sent
            self.by_name[name].copies_bytes += copies

    def _stages(self) -> list[tuple[str, int, int, int, int]]:
        """(owner, number, begin, end, micro-batches) of each stage."""
        if self._plan is None:
            return []
        return [
            (self._places[p], at, own.cuts[at], own.cuts[at + 1], share)
            for own, share in zip(self._plan.pipelines, self._plan.score.shares, strict=True)
            for at, p in enumerate(own.order)
        ]

    def _committed(self) -> None:
        train = self.work.train
        for name, number, begin, end, micro_batches in self._stages():
            own = self.by_name[name]
            own.forward += micro_batches
            own.backward += micro_batches * train
            own.updates += train
            own.stages[number] += 1
            own.flops += float(self._flops[end] - self._flops[begin]) * self.work.passes * micro_batches

    def shares(self) -> dict[str, float]:
        """Of all FLOPs, whose sum is 1; 0 for all before the first step is committed."""
        total = sum(each.flops for each in self.by_name.values())
        return {name: each.flops / total if total else 0.0 for name, each in self.by_name.items()}

    def to_json(self) -> dict[str, Any]:
        """By provider, in units for people."""
        shares = self.shares()
        return {
            name: {
                "share": shares[name],
                "tflop": each.flops / 1e12,
                "forward": each.forward,
                "backward": each.backward,
                "updates": each.updates,
                "stages": {str(number): steps for number, steps in sorted(each.stages.items())},
                "given_up": each.given_up,
                "sent_mib": each.sent_bytes / MIB,
                "copies_mib": each.copies_bytes / MIB,
                "present_s": each.present_s,
            }
            for name, each in sorted(self.by_name.items())
        }


def contributions(noted: Iterable[tuple[Event, Mapping[str, Any]]], chain: Chain, work: Workload) -> Accounts:
    """Of the events of a log (`event_log.read`)."""
    made = Accounts(chain, work)
    for event, more in noted:
        made.note(event, more)
    return made
