"""How the runs of a sweep are ordered, repeated, searched and spared, and what is watched between them."""

from __future__ import annotations

from dataclasses import dataclass, field

from llmsys.schema.fields import at_least, one_of

ORDERS = ("listed", "predicted", "shuffled")
SEARCHES = ("none", "max")


@dataclass(kw_only=True)
class Sweep:
    """See `llmsys.sweep`. No part of what a run is: the same run in another sweep has the same id.

    `order`: as listed; by predicted memory, least first; or shuffled by `seed`. `prune`: what needs at least as much
    memory as a run that was seen to run out of it is not run, and what is only predicted not to fit is (`observes`);
    `monotone`: keys along which memory only grows, beside those that the task declares (`llmsys.tasks.MONOTONE`).
    `repeats`: fresh processes for each cell, round by round; `reference_every`: after so many runs the first cell is
    run once more, to see drift (0: never).
    `baseline_gib`: before each run memory in use must be back to what it was at the sweep's start, give or take this
    (null: not looked at); it is waited for `baseline_timeout_s` at most. A GPU that is not back then is left alone.
    `search=max`: of each combination the largest `search_key` that runs, between 1 and `search_limit`, to a share of
    `search_within`; what is found is run again with `verify_steps` steps, if that is more than it had: memory grows in
    the first steps, and the speed of a step or two is not shown (0: found is found).
    """

    order: str = "listed"
    seed: int = 0
    prune: bool = False
    monotone: list[str] = field(default_factory=list)
    repeats: int = 1
    reference_every: int = 0
    baseline_gib: float | None = None
    baseline_timeout_s: float = 60.0
    search: str = "none"
    search_key: str = "train.micro_batch"
    search_limit: int = 4096
    search_within: float = 0.0
    verify_steps: int = 10

    def __post_init__(self) -> None:
        one_of("sweep.order", self.order, ORDERS)
        one_of("sweep.search", self.search, SEARCHES)
        for key in ("repeats", "search_limit"):
            at_least(f"sweep.{key}", getattr(self, key), 1)
        for key in ("seed", "reference_every", "baseline_timeout_s", "verify_steps"):
            at_least(f"sweep.{key}", getattr(self, key), 0)
        if self.baseline_gib is not None and not self.baseline_gib > 0:
            raise ValueError(f"sweep.baseline_gib={self.baseline_gib}: must be positive")
        if not 0 <= self.search_within < 1:
            raise ValueError(f"sweep.search_within={self.search_within}: must lie in [0, 1)")
        for name in (*self.monotone, self.search_key):
            if not all(name.split(".")) or "." not in name:
                raise ValueError(f"sweep.monotone, sweep.search_key: {name!r} is no key of a group: train.micro_batch")
        for key, value, only in (("repeats", self.repeats, 1), ("reference_every", self.reference_every, 0)):
            if self.search != "none" and value != only:
                raise ValueError(f"sweep.{key}={value}: sweep.search={self.search} makes each run once")

    @property
    def observes(self) -> bool:
        """Whether the sweep goes by what is seen to run out of memory: then no estimate stands in the way of looking,
        where that harms nobody."""
        return self.prune or self.search != "none"
