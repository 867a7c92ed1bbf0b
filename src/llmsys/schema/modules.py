"""What the two tasks are told that look into a step: at its modules, and at the operators that they are made of."""

from __future__ import annotations

from dataclasses import dataclass, field

from llmsys.schema.fields import at_least, one_of
from llmsys.schema.task import Task

OPERATORS = ("gemm", "attention", "softmax", "norm", "memcpy", "collectives")
COLLECTIVES = ("all_reduce", "all_gather", "reduce_scatter")


@dataclass(kw_only=True)
class Modules(Task):
    """`rounds`: in each, one step without any clock, one with the clocks of phases and one with those of modules, so
    that what clocks cost is seen in the same minutes. The first `warmup` rounds do not count. `train.steps` is not
    looked at."""

    kind: str = "bench_modules"
    warmup: int = 2
    rounds: int = 10

    def __post_init__(self) -> None:
        at_least("task.warmup", self.warmup, 1)
        at_least("task.rounds", self.rounds, 2)


@dataclass(kw_only=True)
class Ops(Task):
    """`operators`: which. An operator is repeated until half of its times lie within `spread` of their median, for at
    least `least_s` and at most `most_s` seconds. `sizes_mib`: of what is copied, and of tensors in collectives, which
    need two ranks."""

    kind: str = "bench_ops"
    operators: list[str] = field(default_factory=lambda: list(OPERATORS))
    sizes_mib: list[float] = field(default_factory=lambda: [0.0625, 1.0, 16.0, 64.0])
    spread: float = 0.05
    least_s: float = 0.05
    most_s: float = 0.5

    def __post_init__(self) -> None:
        if not self.operators:
            raise ValueError(f"task.operators=[]: empty; there are {', '.join(OPERATORS)}")
        for name in self.operators:
            one_of("task.operators", name, OPERATORS)
        if not self.sizes_mib or min(self.sizes_mib) < 2**-10:
            raise ValueError(
                f"task.sizes_mib={self.sizes_mib}: needs sizes of 1 KiB (2**-10 MiB) and more, e.g. [1,16]"
            )
        if not 0 < self.spread < 1:
            raise ValueError(f"task.spread={self.spread}: must lie in (0, 1)")
        if not 0 < self.least_s <= self.most_s:
            raise ValueError(f"task.least_s={self.least_s}: must be positive and not above task.most_s={self.most_s}")
