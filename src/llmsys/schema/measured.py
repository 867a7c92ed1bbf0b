"""What the two tasks that measure iterations with compressed gradients are told: on a model, or on a paper's shapes."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

from llmsys.schema.fields import at_least, one_of
from llmsys.schema.task import PAPER_MODELS, Task

NOOP, TORCH = "noop", "torch_powersgd"
MEASURED = (
    *(NOOP, "none", "fp16", "bf16", "sign", "efsign", "topk", "randomk"),
    *("powersgd_packed", "powersgd", "acpsgd", TORCH),
)
"""`noop` exchanges nothing: what is left is computation. `none` is DDP's own all-reduce, S-SGD. `powersgd_packed`:
after the backward pass, at once. `torch_powersgd`: torch's own hook, in one bucket, as it needs on gloo."""


@dataclass(kw_only=True)
class Measured(Task):
    """Every method with every value of the lists, in turns: each turn builds a model, takes `warmup` steps that are not
    timed and `steps` that are, and all turns come `rounds` times. `noop` is always among the methods.

    `bucket_mib`: 0 leaves each tensor alone (no fusion), 25 is DDP's default, with a first bucket of 1 MiB.
    `overlap=[false]`: everything is exchanged after the backward pass. `r`: of Power-SGD and ACP-SGD. `fit`: latency
    and rate of the links, and the speed of compression, are measured before, and each iteration is predicted from
    them.
    """

    methods: list[str] = field(default_factory=lambda: ["none", "powersgd_packed", "powersgd", "acpsgd"])
    bucket_mib: list[float] = field(default_factory=lambda: [25.0])
    overlap: list[bool] = field(default_factory=lambda: [True])
    r: list[int] = field(default_factory=lambda: [4])
    min_rate: float = 4.0
    density: float = 0.001
    warmup: int = 3
    steps: int = 4
    rounds: int = 5
    fit: bool = True

    def __post_init__(self) -> None:
        _each("methods", self.methods, MEASURED)
        for key in ("bucket_mib", "overlap"):
            if not getattr(self, key):
                raise ValueError(f"task.{key}=[]: empty; it is a list of values to measure with")
        for mib in self.bucket_mib:
            at_least("task.bucket_mib", mib, 0)
        for r in self.r:
            at_least("task.r", r, 1)
        at_least("task.min_rate", self.min_rate, 0)
        at_least("task.warmup", self.warmup, 3)
        at_least("task.rounds", self.rounds, 1)
        if self.steps < 2 or self.steps % 2:
            raise ValueError(f"task.steps={self.steps}: must be even, as ACP-SGD's steps are of two kinds")
        if not 0 < self.density <= 1:
            raise ValueError(f"task.density={self.density}: must lie in (0, 1]")


@dataclass(kw_only=True)
class Iteration(Measured):
    """`subject`: `stack` is `layers` linear layers of `width`, `model` the one of the group `model` with random weights
    on synthetic tokens of `train.length`. `batch`: examples of each rank."""

    kind: str = "compress_iteration"
    subject: str = "stack"
    layers: int = 8
    width: int = 768
    batch: list[int] = field(default_factory=lambda: [32])

    def __post_init__(self) -> None:
        super().__post_init__()
        one_of("task.subject", self.subject, ("stack", "model"))
        for key in ("layers", "width"):
            at_least(f"task.{key}", getattr(self, key), 1)
        for key in ("r", "batch"):
            values = getattr(self, key)
            if not values or min(values) < 1:
                raise ValueError(f"task.{key}={values}: needs positive numbers, e.g. task.{key}=[4]")


@dataclass(kw_only=True)
class Replay(Measured):
    """`models`: of the paper, by their parameters' shapes, with synthetic gradients. `pace`: a device of
    `llmsys.cost.hardware`, at whose speed (`precision`, `efficiency` of its peak) the passes go, layer by layer; `none`
    leaves them out. `r`: none for the paper's. `min_rate` 0 is the paper's, every matrix is compressed."""

    kind: str = "compress_replay"
    models: list[str] = field(default_factory=lambda: list(PAPER_MODELS))
    r: list[int] = field(default_factory=list)
    min_rate: float = 0.0
    pace: str = "none"
    precision: str = "fp32"
    efficiency: float = 0.5

    def __post_init__(self) -> None:
        super().__post_init__()
        _each("models", self.models, PAPER_MODELS)
        one_of("task.precision", self.precision, ("fp32", "tf32", "bf16", "fp16"))
        if not 0 < self.efficiency <= 1:
            raise ValueError(f"task.efficiency={self.efficiency}: must lie in (0, 1]")


def _each(key: str, names: Sequence[str], known: Sequence[str]) -> None:
    if not names:
        raise ValueError(f"task.{key}=[]: empty; there are {', '.join(known)}")
    for name in names:
        one_of(f"task.{key}", name, known)
