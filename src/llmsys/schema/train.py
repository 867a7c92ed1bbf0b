"""How a model is trained: the loop, the method (what is trained) and the engine (how ranks share the work)."""

from __future__ import annotations

from dataclasses import dataclass, field

from llmsys.schema import recompute
from llmsys.schema.fields import at_least, one_of
from llmsys.schema.model import DTYPES

SCHEDULES = ("constant", "constant_with_warmup", "linear", "cosine")
LOSSES = ("whole", "chunked")
OPTIMIZERS = ("adamw", "adamw_8bit")
CLOSED_FORM = ("majority", "probe")
"""Methods that train nothing by gradient: they have no learning rate and no steps."""
INITS = ("orthonormal", "gaussian", "pca", "weight_svd", "select")


@dataclass(kw_only=True)
class Train:
    """The one training loop. A step is an optimizer step over `global_batch` examples of `length` tokens.

    The learning rate of a run is `lr_by_method[method.kind] * lr_scale`: it belongs to the method, so that a sweep
    over methods never trains one at another's rate; `lr_scale` is what a sweep over rates varies.
    `threads` of each rank; 0 means its share of the cores this process may use, resolved before the run's id.
    `precision=bf16` with `model.dtype=fp32` means autocast; with `model.dtype=bf16` everything is bf16.
    seq2seq: `length` is the source's, `target_length` the target's; after each evaluation `generate_max` validation
    examples (0: all) are generated for BLEU and ROUGE.
    `recompute`: what blocks compute again in the backward pass instead of keeping it, see `schema.recompute`.
    `loss=chunked`: a language model's cross entropy is taken of some rows of the logits at a time, so that they never
    exist whole; the same numbers.
    `optimizer=adamw_8bit`: AdamW whose two moments are kept in 8 bits (bitsandbytes', arXiv 2110.02861).
    `fp8`: the linear layers of the blocks multiply in 8-bit floats, forward and backward, and are trained
    (`models.float8`); for GPUs that can.
    `resume`: the folder of another run of this model and method, whose newest checkpoint this one goes on from.
    `save_final`: what was trained stays when the run has finished, and, with `checkpoint_every`, its last checkpoint.
    `on_nan`: `stop` ends the run as failed at a loss or gradient that is not finite; `skip` leaves that step's update
    out, up to `max_skips` in a row. A loss above `spike_factor` times its running median is noted, not acted on.
    """

    steps: int = 100
    global_batch: int = 8
    micro_batch: int = 8
    length: int = 128
    target_length: int = 64
    generate_max: int = 64
    precision: str = "fp32"
    lr_by_method: dict[str, float] = field(default_factory=dict)
    lr_scale: float = 1.0
    schedule: str = "linear"
    warmup_steps: int = 0
    weight_decay: float = 0.0
    clip: float = 1.0
    seed: int = 0
    world: int = 1
    threads: int = 0
    recompute: str = "none"
    loss: str = "whole"
    checkpoint_every: int = 0
    log_every: int = 1
    eval_every: int = 0
    eval_batch: int = 32
    save_final: bool = True
    deterministic: bool = True
    resume: str | None = None
    on_nan: str = "stop"
    max_skips: int = 10
    spike_factor: float = 3.0
    optimizer: str = "adamw"
    fp8: bool = False

    def __post_init__(self) -> None:
        one_of("train.precision", self.precision, DTYPES)
        one_of("train.schedule", self.schedule, SCHEDULES)
        recompute.check(self.recompute)
        one_of("train.loss", self.loss, LOSSES)
        one_of("train.optimizer", self.optimizer, OPTIMIZERS)
        one_of("train.on_nan", self.on_nan, ("stop", "skip"))
        for key in ("steps", "global_batch", "micro_batch", "length", "world", "log_every", "eval_batch", "max_skips"):
            at_least(f"train.{key}", getattr(self, key), 1)
        for key in ("threads", "checkpoint_every", "eval_every", "warmup_steps", "clip", "weight_decay", "seed"):
            at_least(f"train.{key}", getattr(self, key), 0)
        at_least("train.target_length", self.target_length, 2)
        at_least("train.generate_max", self.generate_max, 0)
        at_least("train.spike_factor", self.spike_factor, 1)
        for key, rate in {**self.lr_by_method, "lr_scale": self.lr_scale}.items():
            where = "train.lr_scale" if key == "lr_scale" else f"train.lr_by_method.{key}"
            if not rate >= 0:
                raise ValueError(f"{where}={rate}: must not be negative")
        if self.resume == "":
            raise ValueError("train.resume: empty; it is a run's folder, results/<experiment>/<run id>")
        if self.seed >= 2**32:
            raise ValueError(f"train.seed={self.seed}: must be less than 2**32")


@dataclass(kw_only=True)
class Method:
    """What is trained. This base is `full` (every weight), and what every method's config has."""

    kind: str = "full"


@dataclass(kw_only=True)
class Adapter(Method):
    """Low-rank adapters of width `r` and scale `alpha / r` beside the linear layers named in `targets`.

    `targets` are the last parts of module names; empty means every linear layer of the blocks.
    `dtype` is the adapters' own: `fp32` (peft's default) or `model`.
    """

    r: int = 8
    alpha: float = 16.0
    dropout: float = 0.0
    targets: list[str] = field(default_factory=list)
    dtype: str = "fp32"

    def __post_init__(self) -> None:
        at_least("method.r", self.r, 1)
        one_of("method.dtype", self.dtype, ("fp32", "model"))
        if not 0 <= self.dropout < 1:
            raise ValueError(f"method.dropout={self.dropout}: must lie in [0, 1)")


@dataclass(kw_only=True)
class LoRA(Adapter):
    """LoRA and LoRA-FA by `llmsys.lorafa`'s own functions; LoRA-FA freezes A.

    `init`: how A is drawn (`llmsys.lorafa.basis`); `share_a`: layers that read the same input have one A;
    `correction`: of B's gradient (LoRA-FA's second version); `bias`: `lora_only` trains adapted layers' biases too.
    """

    init: str = "orthonormal"
    share_a: bool = False
    correction: str = "none"
    bias: str = "none"

    def __post_init__(self) -> None:
        super().__post_init__()
        one_of("method.init", self.init, INITS)
        one_of("method.correction", self.correction, ("none", "closed_form"))
        one_of("method.bias", self.bias, ("none", "lora_only"))
        if self.kind == "lora" and self.correction != "none":
            raise ValueError(f"method.correction={self.correction}: is for a frozen A, method=lorafa")

    @property
    def train_a(self) -> bool:
        return self.kind == "lora"


@dataclass(kw_only=True)
class Engine:
    """How ranks share the work. This base is `local`, one rank on one device, and `tp`: each weight matrix is cut over
    all ranks, which see the same examples."""

    kind: str = "local"


@dataclass(kw_only=True)
class DDP(Engine):
    """Every rank has the whole model and a share of the batch; gradients are averaged in buckets of `bucket_mib`."""

    bucket_mib: float = 25.0

    def __post_init__(self) -> None:
        if not self.bucket_mib > 0:
            raise ValueError(f"engine.bucket_mib={self.bucket_mib}: must be positive")


@dataclass(kw_only=True)
class DeepSpeed(Engine):
    """ZeRO: `zero` 1 shares the optimizer's state over the ranks, 2 the gradients too, 3 the weights too; 0 nothing.

    `offload`: what lies in host memory instead of the device's: `none`, `optimizer`, or `optimizer+params` (stage 3).
    `optimizer`: torch's AdamW, or DeepSpeed's own for CPUs (`cpu_adam`), which is compiled on first use.
    """

    zero: int = 0
    offload: str = "none"
    optimizer: str = "torch"

    def __post_init__(self) -> None:
        one_of("engine.offload", self.offload, ("none", "optimizer", "optimizer+params"))
        one_of("engine.optimizer", self.optimizer, ("torch", "cpu_adam"))
        if self.zero not in (0, 1, 2, 3):
            raise ValueError(f"engine.zero={self.zero}: must be 0, 1, 2 or 3")
        if self.offload != "none" and self.zero == 0:
            raise ValueError(f"engine.offload={self.offload}: needs engine.zero of 1, 2 or 3")
        if self.offload == "optimizer+params" and self.zero != 3:
            raise ValueError("engine.offload=optimizer+params: parameters are offloaded with engine.zero=3 only")


@dataclass(kw_only=True)
class FSDP2(Engine):
    """Every weight is cut over the ranks and gathered block by block. `reshard`: freed again after the block's forward
    pass, and gathered a second time for its backward pass."""

    reshard: bool = True


def data_world(train: Train, engine: Engine) -> int:
    """Into how many shares the global batch is cut: one for each rank, but one in all where ranks share a matrix."""
    return 1 if engine.kind == "tp" else train.world


def accumulation(train: Train, engine: Engine) -> int:
    """Micro-batches per rank and optimizer step."""
    return train.global_batch // (train.micro_batch * data_world(train, engine))
