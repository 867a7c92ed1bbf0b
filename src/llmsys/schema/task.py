"""Which function runs, and what it is told beside the groups that all tasks share."""

from __future__ import annotations

from dataclasses import dataclass, field

from llmsys.schema.fields import at_least, one_of
from llmsys.schema.recompute import POLICIES

COLUMNS = (
    *("full", "peft_lora", "peft_lora_bf16", "peft_lora_compiled", "peft_lora_bf16_compiled"),
    *("peft_lorafa", "peft_lorafa_bf16"),
    *(f"{method}/{policy}" for method in ("lora", "lorafa") for policy in POLICIES),
)
"""What a ledger compares: see `llmsys.lorafa.ledger.columns`."""
SIMULATED = ("none", "fp16", "sign", "efsign", "topk", "randomk", "powersgd_packed", "powersgd", "acpsgd")
"""Ways to exchange gradients whose iterations are simulated; `powersgd_packed`: after the backward pass, at once."""
PAPER_MODELS = ("resnet50", "resnet152", "bert_base", "bert_large")
SIMULATED_NETWORKS = ("eth1g", "eth10g", "ib100")
BACKENDS = ("aot_eager_decomp_partition", "inductor", "none")


@dataclass(kw_only=True)
class Task:
    """Which function runs; see `llmsys.tasks`."""

    kind: str = "train"


@dataclass(kw_only=True)
class Ledger(Task):
    """What LoRA-FA's ledger measures and predicts.

    `width`: the model's shape is cut to about this hidden size for the measurement, its ratios kept; a smaller model is
    measured as it is. `dropout` of the adapters, beside none. `batches` and `lengths`: the grid of the whole-model
    prediction. `backend` of `torch.compile` for its columns: `aot_eager_decomp_partition` keeps what inductor keeps, by
    the same partitioner, and generates no code; `none` leaves these columns out. `columns`: which; none for all.
    """

    kind: str = "lorafa_ledger"
    width: int = 512
    dropout: float = 0.1
    batches: list[int] = field(default_factory=lambda: [1, 8, 32, 64])
    lengths: list[int] = field(default_factory=lambda: [128, 512, 2048])
    backend: str = BACKENDS[0]
    columns: list[str] = field(default_factory=list)

    def __post_init__(self) -> None:
        at_least("task.width", self.width, 16)
        one_of("task.backend", self.backend, BACKENDS)
        if not 0 < self.dropout < 1:
            raise ValueError(f"task.dropout={self.dropout}: must lie in (0, 1); none at all is measured anyway")
        for name in self.columns:
            one_of("task.columns", name, COLUMNS)
        for key in ("batches", "lengths"):
            values = getattr(self, key)
            if not values or min(values) < 1:
                raise ValueError(f"task.{key}={values}: needs positive numbers, e.g. task.{key}=[8,64]")


@dataclass(kw_only=True)
class Simulate(Task):
    """What `llmsys.compress.simulate` predicts, for the device `hardware.name`.

    `worlds`: numbers of GPUs, `per_machine` of them on one link. `precision` and `efficiency`: forward, backward and
    compression reach this share of the device's peak (an RTX 2080 Ti 0.54 and 0.57 on ResNet-50 and ResNet-152, by
    Lambda's benchmarks of 2019); `memory_efficiency`: compression, of its memory's bandwidth; `launch_us`: the least
    that a kernel takes. These three are round assumptions.
    `min_rate`: 0 is the paper's, every matrix is compressed. `bucket_mib`: 0 leaves each tensor alone; `overlap=false`:
    nothing goes on at the same time.
    What was measured elsewhere: `alpha_s` (a message) and `beta_bytes_per_s` (a link) in place of `networks`,
    `gamma_bytes_per_s` (memory, in compression), `compute_ms` (forward and backward pass, by model).
    """

    kind: str = "compress_simulate"
    models: list[str] = field(default_factory=lambda: list(PAPER_MODELS))
    methods: list[str] = field(default_factory=lambda: list(SIMULATED))
    networks: list[str] = field(default_factory=lambda: list(SIMULATED_NETWORKS))
    worlds: list[int] = field(default_factory=lambda: [8, 16, 32, 64])
    per_machine: int = 4
    precision: str = "fp32"
    efficiency: float = 0.5
    memory_efficiency: float = 0.8
    launch_us: float = 5.0
    bucket_mib: float = 25.0
    overlap: bool = True
    min_rate: float = 0.0
    density: float = 0.001
    alpha_s: float | None = None
    beta_bytes_per_s: float | None = None
    gamma_bytes_per_s: float | None = None
    compute_ms: dict[str, float] = field(default_factory=dict)

    def __post_init__(self) -> None:
        for key, known in (
            ("models", PAPER_MODELS),
            ("methods", SIMULATED),
            ("networks", SIMULATED_NETWORKS),
            ("compute_ms", PAPER_MODELS),
        ):
            names = getattr(self, key)
            if not names and key != "compute_ms":
                raise ValueError(f"task.{key}=[]: empty; there are {', '.join(known)}")
            for name in names:
                one_of(f"task.{key}", name, known)
        one_of("task.precision", self.precision, ("fp32", "tf32", "bf16", "fp16"))
        at_least("task.per_machine", self.per_machine, 1)
        if not self.worlds:
            raise ValueError("task.worlds=[]: empty; it is a list of numbers of GPUs, e.g. task.worlds=[8,32]")
        for world in self.worlds:
            at_least("task.worlds", world, 1)
            if world > self.per_machine and world % self.per_machine:
                raise ValueError(f"task.worlds={world}: must be a multiple of task.per_machine={self.per_machine}")
        for key in ("efficiency", "memory_efficiency", "density"):
            if not 0 < getattr(self, key) <= 1:
                raise ValueError(f"task.{key}={getattr(self, key)}: must lie in (0, 1]")
        for key in ("launch_us", "bucket_mib", "min_rate"):
            at_least(f"task.{key}", getattr(self, key), 0)
        for name, given in (
            ("beta_bytes_per_s", self.beta_bytes_per_s),
            ("gamma_bytes_per_s", self.gamma_bytes_per_s),
            *((f"compute_ms.{model}", ms) for model, ms in self.compute_ms.items()),
        ):
            if given is not None and not given > 0:
                raise ValueError(f"task.{name}={given}: must be positive")
        if self.alpha_s is not None:
            at_least("task.alpha_s", self.alpha_s, 0)
        if (self.alpha_s is None) != (self.beta_bytes_per_s is None):
            missing = "alpha_s" if self.alpha_s is None else "beta_bytes_per_s"
            raise ValueError(f"task.{missing}: missing; a link is given by task.alpha_s and task.beta_bytes_per_s")
