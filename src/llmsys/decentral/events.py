"""What can happen to a job that many providers share: frozen records, of which the broker's state is the sum.

Each has the time at which the broker learnt of it, in seconds on its clock, so that the same events give the same state
on any machine and at any speed. What providers say carries the epoch that they say it of: a new epoch begins with each
new plan, and whoever still speaks of an old one, a process that was stopped and has woken up, is not listened to.
"""

from __future__ import annotations

from dataclasses import dataclass, field

from llmsys.decentral.fleet import Provider
from llmsys.decentral.plan import Plan


@dataclass(frozen=True, kw_only=True)
class Event:
    at_s: float


@dataclass(frozen=True, kw_only=True)
class Joined(Event):
    """A provider offers itself."""

    provider: Provider


@dataclass(frozen=True, kw_only=True)
class Left(Event):
    """One says that it goes."""

    name: str


@dataclass(frozen=True, kw_only=True)
class Beat(Event):
    """These are alive."""

    names: frozenset[str]


@dataclass(frozen=True, kw_only=True)
class OfStep(Event):
    """Said of a step, in an epoch."""

    epoch: int
    step: int


@dataclass(frozen=True, kw_only=True)
class ByProviders(OfStep):
    """By these, of their stages."""

    names: frozenset[str]


@dataclass(frozen=True, kw_only=True)
class Held(ByProviders):
    """These have the parameters of their stages as they are after `step`, and can begin the next."""


@dataclass(frozen=True, kw_only=True)
class Prepared(ByProviders):
    """These have all gradients of `step`, and have changed nothing yet."""


@dataclass(frozen=True, kw_only=True)
class Lost(Event):
    """The broker has not heard of one for too long."""

    name: str


@dataclass(frozen=True, kw_only=True)
class Planned(Event):
    """A new epoch, with its plan; `plan` None where nothing holds the model any more."""

    epoch: int
    plan: Plan | None
    how: str = "plan"
    moved_bytes: float = field(default=0.0, compare=False)


@dataclass(frozen=True, kw_only=True)
class Judged(Event):
    """Checks have found something; what, goes with it. It changes nothing of the state."""


@dataclass(frozen=True, kw_only=True)
class Began(OfStep):
    """All hold the state after `step - 1`, and have been told to compute `step`."""


@dataclass(frozen=True, kw_only=True)
class Committed(OfStep):
    """All have prepared `step`: it counts, and each is to apply its update, once."""
