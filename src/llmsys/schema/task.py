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
