"""What the broker promises, checked as it speaks: the simulator's and the tests' judge.

Committed steps only ever grow by one, each stage has one owner in an epoch and an epoch one plan, no stage is without
an owner when a step begins, nobody has more than its memory holds, and a step is committed only when every owner has
prepared it in that epoch.
"""

from __future__ import annotations

from collections.abc import Iterable, Set

from llmsys.decentral.broker import State
from llmsys.decentral.events import Began, ByProviders, Committed, Event, Held, Lost, Planned
from llmsys.decentral.fleet import GIB
from llmsys.decentral.plan import Plan


class Broken(AssertionError):
    """A promise that was not kept."""


class Promises:
    """Of what providers have really said, (epoch, step), the newest of each."""

    def __init__(self) -> None:
        self.prepared: dict[str, tuple[int, int]] = {}
        self.holds: dict[str, tuple[int, int]] = {}

    def said(self, event: ByProviders, names: Iterable[str]) -> None:
        """These have, whether the broker hears them or not; what the hung say late is no news."""
        kind = self.holds if isinstance(event, Held) else self.prepared
        for name in names:
            kind[name] = max(kind.get(name, (0, 0)), (event.epoch, event.step))

    def check(self, event: Event, before: State, there: Set[str]) -> None:
        """Raises `Broken` for what the broker says in a state, while these are there and well."""
        if isinstance(event, Planned):
            if event.epoch != before.epoch + 1:
                raise Broken(f"epoch {event.epoch} follows {before.epoch}")
            if event.plan is not None:
                check_plan(event.plan, before)
        elif isinstance(event, Began):
            if not before.owners <= before.present:
                raise Broken(f"step {event.step} begins without {min(before.owners - before.present)}")
            lacking = [name for name in before.owners if self.holds.get(name) != (before.epoch, before.step)]
            if event.step != before.step + 1 or lacking:
                raise Broken(f"step {event.step} begins after {before.step}; {lacking} do not hold it")
        elif isinstance(event, Committed):
            lacking = [name for name in before.owners if self.prepared.get(name) != (before.epoch, event.step)]
            if event.step != before.step + 1 or lacking:
                raise Broken(f"step {event.step} is committed after {before.step}; {lacking} have not prepared it")
        elif isinstance(event, Lost) and event.name in there:
            raise Broken(f"{event.name} is there, and was given up")


def check_plan(plan: Plan, before: State) -> None:
    """Raises `Broken` for a plan that cannot be, of those who are there."""
    costs, seen = before.costs, set[int]()
    for each in plan.pipelines:
        if each.cuts[0] != 0 or each.cuts[-1] != costs.chain.count or len(each.cuts) != len(each.order) + 1:
            raise Broken(f"a pipeline cut at {each.cuts}: a stage has no owner")
        if seen & set(each.order) or len(set(each.order)) != len(each.order):
            raise Broken(f"a provider of {each.order} owns two stages")
        seen |= set(each.order)
        stages = costs.stages(each.order, each.cuts)
        limits = [costs.fleet.providers[p].mem_gib * GIB for p in each.order]
        if stages is None or any(s.device_bytes > limit for s, limit in zip(stages, limits, strict=True)):
            raise Broken(f"a provider of {each.order} has more than its memory holds")
    if seen & before.absent:
        raise Broken(f"provider {min(seen & before.absent)} has gone, and owns a stage")
