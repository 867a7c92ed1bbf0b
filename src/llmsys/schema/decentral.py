"""What the tasks of `llmsys.decentral` are told that plan and compare, and run nothing."""

from __future__ import annotations

from dataclasses import dataclass, field

from llmsys.schema.fields import at_least, one_of
from llmsys.schema.task import Task

FLEETS = ("datacentre", "cloud", "homes")
OBJECTIVES = ("throughput", "latency")
SCHEDULES = ("eager_1f1b", "1f1b", "gpipe")
AUTO = "auto"
LEVELS = ("operator", "layer")


@dataclass(kw_only=True)
class Planning(Task):
    """A task about a model on machines that are described: it needs none of them, and no data.

    What is planned for is `train.micro_batch` rows of `train.length` tokens of `model`, in `model.dtype`, with
    `train.recompute`. `train`: with backward pass and optimizer, or the forward pass alone. `optimizer_bytes`: of its
    state for a byte of weights; 0: AdamW's, 2 in fp32, 6 in bf16 (weights and moments in fp32). `level`: cut between
    operators, or between layers alone.
    """

    kind: str = "decentral_plan"
    train: bool = True
    level: str = "operator"
    optimizer_bytes: float = 0.0

    def __post_init__(self) -> None:
        one_of("task.level", self.level, LEVELS)
        if not self.optimizer_bytes >= 0:
            raise ValueError(f"task.optimizer_bytes={self.optimizer_bytes}: must be 0 or more")


@dataclass(kw_only=True)
class DecentralPlan(Planning):
    """Which provider runs what.

    `fleet`: a kind of `llmsys.decentral.fleets`, of which `providers` are drawn by `fleet_seed`; or a file, YAML or
    JSON (`llmsys.decentral.fleet_file`). `objective`: most micro-batches a second, or one of them soonest. `replicas`
    of the pipeline; 0: as many as are best. `micro_batches` of a step, over all replicas; `schedule` of each; auto:
    1F1B, eager or not, whichever does more. `offload`: the optimizer may be on hosts. `private`: operators that trusted
    providers alone may run, the first and the last so many. `regions`: where providers may be; empty: anywhere.
    `min_mbit`: slower lines are left alone. `density`: of what crosses the slowest line, the share that Top-k sends,
    and of the others as much more as they are faster (AdaTopK, arXiv 2410.12707); 1: all of it.
    """

    kind: str = "decentral_plan"
    fleet: str = "homes"
    providers: int = 16
    fleet_seed: int = 0
    objective: str = "throughput"
    replicas: int = 0
    micro_batches: int = 64
    schedule: str = AUTO
    offload: bool = False
    private: list[int] = field(default_factory=lambda: [0, 0])
    regions: list[str] = field(default_factory=list)
    min_mbit: float = 0.0
    density: float = 1.0

    def __post_init__(self) -> None:
        super().__post_init__()
        one_of("task.objective", self.objective, OBJECTIVES)
        one_of("task.schedule", self.schedule, (AUTO, *SCHEDULES))
        if not self.fleet:
            raise ValueError(f"task.fleet: empty; it is one of {', '.join(FLEETS)}, or a file")
        for key, least in (("providers", 1), ("replicas", 0), ("micro_batches", 1), ("fleet_seed", 0)):
            at_least(f"task.{key}", getattr(self, key), least)
        if len(self.private) != 2 or min(self.private) < 0:
            raise ValueError(f"task.private={self.private}: must be two numbers, of the first and the last operators")
        if self.objective == "latency" and self.replicas > 1:
            raise ValueError(f"task.replicas={self.replicas}: task.objective=latency is one micro-batch's")
        if self.replicas > self.micro_batches:
            raise ValueError(f"task.replicas={self.replicas}: task.micro_batches={self.micro_batches} are fewer")
        if not self.min_mbit >= 0:
            raise ValueError(f"task.min_mbit={self.min_mbit}: must be 0 or more")
        if not 0 < self.density <= 1:
            raise ValueError(f"task.density={self.density}: must lie in (0, 1]")


@dataclass(kw_only=True)
class DecentralSimulate(DecentralPlan):
    """What a plan's goodput is when providers come and go: `hours` on a virtual clock, for each mean time between a
    provider's failures in `mtbf_s`, each with `runs` seeds from `churn_seed` on.

    `begin`: so many providers are there at first, the others come later; 0: all. Means and shares as of
    `llmsys.decentral.churn.Churn`: `shares` of those that leave, die, hang and slow down.
    """

    kind: str = "decentral_simulate"
    hours: float = 1.0
    runs: int = 3
    churn_seed: int = 0
    begin: int = 0
    mtbf_s: list[float] = field(default_factory=lambda: [600.0, 3600.0, 21600.0, 86400.0])
    away_s: float = 600.0
    shares: list[float] = field(default_factory=lambda: [0.3, 0.4, 0.2, 0.1])
    hang_s: float = 30.0
    slow_s: float = 60.0
    slowdown: float = 3.0

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.objective == "latency":
            raise ValueError("task.objective=latency: goodput is throughput's")
        if not self.train:
            raise ValueError("task.train=false: what is simulated are steps of training")
        at_least("task.runs", self.runs, 1)
        at_least("task.begin", self.begin, 0)
        for key in ("hours", "away_s", "hang_s", "slow_s"):
            if not getattr(self, key) > 0:
                raise ValueError(f"task.{key}={getattr(self, key)}: must be positive")
        if not self.mtbf_s or not all(each > 0 for each in self.mtbf_s):
            raise ValueError(f"task.mtbf_s={self.mtbf_s}: must be positive numbers, e.g. task.mtbf_s=[3600]")
        if len(self.shares) != 4 or min(self.shares) < 0 or abs(sum(self.shares) - 1) > 1e-9:
            raise ValueError(f"task.shares={self.shares}: must be four, 0 or more, and 1 altogether")
        if not self.slowdown >= 1:
            raise ValueError(f"task.slowdown={self.slowdown}: must be 1 or more")


@dataclass(kw_only=True)
class DecentralPerf(Planning):
    """`small_count` cards `small` on lines between them, against `large_count` of each of `large`, which their own
    links join. `efficiency`: shares of the peak that either may reach: the comparison is made for all pairs. Latencies
    are over lines of `mbit` and `delay_ms`, and of each of `delays_ms`; throughputs also over `rates_mbit`."""

    kind: str = "decentral_perf"
    small: str = "rtx3080"
    small_count: int = 50
    large: list[str] = field(default_factory=lambda: ["h100_pcie", "h100"])
    large_count: int = 4
    efficiency: list[float] = field(default_factory=lambda: [0.4, 0.5, 0.6])
    mbit: float = 1000.0
    delay_ms: float = 10.0
    rates_mbit: list[float] = field(default_factory=lambda: [10, 30, 100, 300, 1000, 3000, 10000, 30000, 100000])

    delays_ms: list[float] = field(default_factory=lambda: [0.1, 1, 10, 30, 100])

    def __post_init__(self) -> None:
        super().__post_init__()
        if not self.delays_ms or not all(each >= 0 for each in self.delays_ms):
            raise ValueError(f"task.delays_ms={self.delays_ms}: must be 0 or more, e.g. task.delays_ms=[1,10]")
        for key in ("small_count", "large_count"):
            at_least(f"task.{key}", getattr(self, key), 1)
        if not self.large:
            raise ValueError("task.large: empty; it names cards, e.g. task.large=[h100]")
        if not self.efficiency or not all(0 < each <= 1 for each in self.efficiency):
            raise ValueError(f"task.efficiency={self.efficiency}: must be shares in (0, 1], e.g. task.efficiency=[0.5]")
        if not self.rates_mbit or not all(each > 0 for each in (self.mbit, *self.rates_mbit)):
            raise ValueError(f"task.rates_mbit={self.rates_mbit}, task.mbit={self.mbit}: must be positive")
        at_least("task.delay_ms", self.delay_ms, 0)


@dataclass(kw_only=True)
class DecentralProfile(Planning):
    """How much of its peak this machine reaches on the model, in `rounds` of each of its first layers; `provider`: what
    it is called in a fleet."""

    kind: str = "decentral_profile"
    rounds: int = 9
    provider: str = "this"

    def __post_init__(self) -> None:
        super().__post_init__()
        at_least("task.rounds", self.rounds, 1)
        if not self.provider:
            raise ValueError("task.provider: empty; it is the machine's name in a fleet")
