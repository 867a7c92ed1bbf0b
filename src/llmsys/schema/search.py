"""What is searched for the best of: settings, a metric of the record, and how many runs."""

from __future__ import annotations

from dataclasses import dataclass, field

from llmsys.schema.fields import at_least, one_of

DIRECTIONS = ("minimize", "maximize")
SAMPLERS = ("tpe", "random", "qmc", "cmaes")
PRUNERS = ("none", "median", "hyperband", "successive_halving")


@dataclass(kw_only=True)
class Search:
    """See `llmsys.search`. No part of what a run is: a trial is an ordinary run, and taken from there if it was made.

    `metric`: a key of a record's summary, of which the best is searched in `direction`. `space`: settings in Hydra's
    words: `KEY=interval(0.1,10)`, `KEY=tag(log,interval(1e-5,1e-2))`, `KEY=int(interval(1,8))`, `KEY=range(10,60,10)`,
    `KEY=choice(a,b)`. `trials`: how many runs in all, earlier sessions' included; 0: nothing is searched. `sampler`,
    `pruner`: Optuna's, by name; `seed` of the sampler. A pruner looks at `watch`, a key of the rows of `metrics.jsonl`
    (`loss`, `val_loss`), in `watch_direction`, from the step `watch_from` on, once `startup` trials have ended.
    """

    metric: str = ""
    direction: str = "maximize"
    trials: int = 0
    space: list[str] = field(default_factory=list)
    sampler: str = "tpe"
    pruner: str = "none"
    watch: str = ""
    watch_direction: str = "minimize"
    watch_from: int = 0
    startup: int = 5
    seed: int = 0

    def __post_init__(self) -> None:
        one_of("search.direction", self.direction, DIRECTIONS)
        one_of("search.watch_direction", self.watch_direction, DIRECTIONS)
        one_of("search.sampler", self.sampler, SAMPLERS)
        one_of("search.pruner", self.pruner, PRUNERS)
        for key in ("trials", "watch_from", "startup", "seed"):
            at_least(f"search.{key}", getattr(self, key), 0)
        if not self.trials:
            return
        if not self.metric:
            raise ValueError("search.metric: missing; a key of a record's summary, e.g. search.metric=val_loss")
        if not self.space:
            raise ValueError("search.space: empty; e.g. 'search.space=[\"train.lr_scale=tag(log,interval(0.1,10))\"]'")
        if self.pruner != "none" and not self.watch:
            raise ValueError(f"search.pruner={self.pruner}: needs search.watch, a key of metrics.jsonl, e.g. loss")
