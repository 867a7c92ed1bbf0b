"""What is predicted: a config, and the facts about a run that its first groups do not say.

Every cost model takes (model, train, method, engine) and these facts as keywords; inside, all of it is one `Case`.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TypedDict

from llmsys import schema
from llmsys.schema import recompute
from llmsys.schema.coherence import CUT_FAMILIES

ADAPTERS = ("lora_peft", "lorafa_peft", "lora", "lorafa")
METHODS = ("full", *ADAPTERS, *schema.CLOSED_FORM)
ENGINES = ("local", "ddp", "deepspeed", "fsdp2", "tp")
UNPACKED = ("code_docstrings", "jsonl", "synthetic_pairs")
"""Data of prompts and answers: each example is a row of its own."""


class Facts(TypedDict, total=False):
    """What data, device and the way of gradients add to a config; see `Case`."""

    num_labels: int
    padded: bool | None
    device: str
    compress: schema.Compress


def facts(config: schema.Config, device: str) -> Facts:
    """What a config's data adds to it, for `device`. The classes of `hub` data are not known before it is read: two."""
    labels = {"images": 0 if config.data.kind == "hub" else 10}.get(config.model.objective, len(config.data.labels))
    return Facts(num_labels=labels, padded=padded(config), device=device, compress=config.compress)


def padded(config: schema.Config) -> bool:
    """Whether batches carry an attention mask: rows that differ in length do, and packed text does not."""
    if config.model.objective == "causal_lm":
        return config.data.kind in UNPACKED or (config.data.kind == "hub" and "text" not in config.data.columns)
    return config.model.objective != "images"


@dataclass(frozen=True)
class Case:
    """A config and what it runs on.

    `num_labels`: classes of a classifier; 0 means two of a text, `model.num_classes` of an
    image. `padded`: batches carry an attention mask; None means that they do
    for bert, roberta and t5, and do not for llama and gpt2. `device`: `cpu` and `cuda` differ in dropout's masks and in
    attention's kernels. `compress`: how gradients travel. Raises ValueError for a method or an engine that is not known
    here.
    """

    model: schema.Model
    train: schema.Train
    method: schema.Method
    engine: schema.Engine
    num_labels: int = 0
    padded: bool | None = None
    device: str = "cpu"
    compress: schema.Compress = field(default_factory=schema.Compress)

    def __post_init__(self) -> None:
        for key, kind, known in (("method", self.method.kind, METHODS), ("engine", self.engine.kind, ENGINES)):
            if kind not in known:
                raise ValueError(f"{key}.kind={kind}: no cost is known for it; there is one for {', '.join(known)}")

    @property
    def labels(self) -> int:
        """Classes of a classifier."""
        return self.num_labels or (self.model.num_classes if isinstance(self.model, schema.ConvNet) else 2)

    @property
    def masked(self) -> bool:
        return self.model.family in ("bert", "roberta", "t5") if self.padded is None else self.padded

    @property
    def width(self) -> int:
        """Bytes of a weight."""
        return 2 if self.model.dtype == "bf16" else 4

    @property
    def product_width(self) -> int:
        """Bytes of what a product makes."""
        return 2 if self.autocast else self.width

    @property
    def autocast(self) -> bool:
        """fp32 weights, bf16 products."""
        return self.train.precision == "bf16" and self.model.dtype == "fp32"

    @property
    def trains(self) -> bool:
        """Whether anything is trained by gradient."""
        return self.method.kind not in schema.CLOSED_FORM

    @property
    def adapter(self) -> schema.Adapter | None:
        return self.method if isinstance(self.method, schema.Adapter) else None

    @property
    def fused(self) -> schema.LoRA | None:
        """The method, where adapted layers are `llmsys.lorafa`'s pieces."""
        return self.method if isinstance(self.method, schema.LoRA) else None

    @property
    def chained(self) -> bool:
        """Whether whole blocks are chains of pieces; other families' adapted layers are pieces one by one."""
        plain = isinstance(self.model, schema.Transformer) and self.model.plain
        return self.fused is not None and self.model.family in CUT_FAMILIES and plain

    @property
    def zero(self) -> int:
        """ZeRO's stage; 0 where nothing is shared."""
        return self.engine.zero if isinstance(self.engine, schema.DeepSpeed) else 0

    @property
    def adapter_width(self) -> int:
        """Bytes of an adapter's weight. ZeRO's slices are flat: DeepSpeed casts all of a bf16 model, adapters too.

        `model` is for `lora` and `lorafa` the dtype of the layer, and for 8-bit integers bf16.
        """
        if self.adapter and self.adapter.dtype == "fp32":
            return self.width if self.zero else 4
        return self.frozen_width if self.fused else self.width

    @property
    def frozen_width(self) -> int:
        """Bytes of a frozen A's elements. A 4-bit weight is stored under the model's dtype."""
        return 2 if self.model.quant == "int8" else self.width

    @property
    def policies(self) -> list[str]:
        """What each block computes again, in the model's order: see `schema.recompute`."""
        if not isinstance(self.model, schema.Transformer):
            return []
        stacks = 2 if self.model.family == "t5" else 1
        return recompute.policies(self.train.recompute, stacks * self.model.num_layers)

    @property
    def cut(self) -> int:
        """Into how many parts tensor parallelism cuts a matrix."""
        return self.train.world if self.engine.kind == "tp" else 1
