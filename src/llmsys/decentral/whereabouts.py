"""How a job's model is cut, and where its state is: what the broker knows of it."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from llmsys.decentral.broker import State
from llmsys.decentral.cutting import Cutting
from llmsys.decentral.holdings import Place


class JobLost(RuntimeError):
    """Nobody has what the job needs to go on, and nobody can compute it again."""


class Stuck(RuntimeError):
    """A step has been begun again and again, and comes to no end."""


@dataclass(kw_only=True)
class Told:
    """What providers have said since the epoch began; `plan`: who is told of it; `due` of them, with their stages:
    who is not told yet, as what is sent with the stage is still being made; `waiting`: so is something else."""

    plan: set[str] = field(default_factory=set)
    due: dict[str, int | None] = field(default_factory=dict)
    waiting: bool = False
    gathering: bool = False
    holds: dict[str, set[str]] = field(default_factory=dict)
    stages: dict[Place, str] = field(default_factory=dict)
    copies: dict[Place, dict[int, set[str]]] = field(default_factory=dict)
    since: dict[Place, int] = field(default_factory=dict)
    asked: dict[str, set[str]] = field(default_factory=dict)
    copying: bool = False
    reviving: dict[int, str] = field(default_factory=dict)
    squares: dict[str, float] = field(default_factory=dict)
    results: tuple[Any, ...] = ()


@dataclass(kw_only=True)
class Whereabouts:
    """`cutting`: as the model is cut now; `base`: as it was when the last step was computed; `cuttings`: these, by
    number."""

    cutting: Cutting | None = None
    base: Cutting | None = None
    cuttings: dict[int, Cutting] = field(default_factory=dict)
    told: Told = field(default_factory=Told)

    @property
    def now(self) -> Cutting:
        """As the model is cut now, once there has been a plan."""
        assert self.cutting is not None
        return self.cutting

    @property
    def places(self) -> list[Place]:
        """Of its stages."""
        return [(self.now.number, at) for at in range(len(self.now.stages))]


def owners(state: State) -> list[str]:
    """Of stages, in their order, by the plan."""
    assert state.plan is not None
    (pipeline,) = state.plan.pipelines
    return [state.providers[p].name for p in pipeline.order]


def trusted(name: str, state: State) -> bool:
    """Whether somebody who has joined may see what is private."""
    place = state.place(name)
    assert place is not None
    return state.providers[place].trusted
