"""Every setting of a run, as dataclasses: types, defaults, units and the checks that need nothing but the values.

Hydra composes `conf/` over these classes in the parent process, where a typo or a wrong type stops with the key's
name; the result travels as a plain dict, and `build` makes the typed `Config` again wherever the run is executed.
This file imports nothing heavy and does no I/O: `--help`, the launcher and the cost models all read it.
"""

from __future__ import annotations

import dataclasses
import difflib
import math
import re
from dataclasses import dataclass, field
from typing import Any

FAMILIES = ("llama", "bert")
DTYPES = ("fp32", "bf16")
ATTENTION = ("eager", "sdpa", "flash_attention_2")
RECOMPUTE = ("none", "block")
SCHEDULES = ("constant", "constant_with_warmup", "linear", "cosine")
DEVICES = ("auto", "cpu", "cuda")
OBJECTIVES = {
    "code_lm": "causal_lm",
    "code_docstrings": "causal_lm",
    "jsonl": "causal_lm",
    "synthetic": "causal_lm",
    "code_packages": "classification",
}
"""What a data set trains: next-token prediction or one label per text."""

CLOSED_FORM = ("majority", "probe")
"""Methods that train nothing by gradient: they have no learning rate and no steps."""


def _one_of(key: str, value: str, allowed: tuple[str, ...] | list[str]) -> None:
    if value not in allowed:
        raise ValueError(f"{key}={value}: must be one of {', '.join(allowed)}")


def _at_least(key: str, value: float, least: float) -> None:
    if not value >= least:
        raise ValueError(f"{key}={value}: must be at least {least:g}")


@dataclass(kw_only=True)
class Task:
    """Which function runs; see `llmsys.tasks`."""

    kind: str = "train"


@dataclass(kw_only=True)
class Model:
    """A transformer's published shape, and where its weights come from.

    `weights`: `random`, a local folder, a Hugging Face hub id, `package:<module>` (a pip package that carries a
    `model` folder), or `run:<exp>` (the weights that experiment's run left).
    `tokenizer`: `bytes` (byte level, no file needed) or `weights` (the one that lies beside the weights).
    """

    name: str = "scratch"
    family: str = "llama"
    vocab_size: int = 320
    hidden_size: int = 64
    intermediate_size: int = 176
    num_layers: int = 2
    num_heads: int = 4
    num_kv_heads: int = 4
    max_length: int = 512
    norm_eps: float = 1e-5
    rope_theta: float = 10000.0
    tie_embeddings: bool = False
    weights: str = "random"
    tokenizer: str = "bytes"
    dtype: str = "fp32"
    attention: str = "sdpa"
    dropout: float = 0.0

    def __post_init__(self) -> None:
        _one_of("model.family", self.family, FAMILIES)
        _one_of("model.dtype", self.dtype, DTYPES)
        _one_of("model.attention", self.attention, ATTENTION)
        _one_of("model.tokenizer", self.tokenizer, ("bytes", "weights"))
        for key in ("vocab_size", "hidden_size", "intermediate_size", "num_layers", "num_heads", "num_kv_heads"):
            _at_least(f"model.{key}", getattr(self, key), 1)
        if self.hidden_size % self.num_heads:
            raise ValueError(f"model.hidden_size={self.hidden_size}: must be a multiple of num_heads={self.num_heads}")
        if self.num_heads % self.num_kv_heads:
            raise ValueError(f"model.num_kv_heads={self.num_kv_heads}: must divide num_heads={self.num_heads}")
        if not 0 <= self.dropout < 1:
            raise ValueError(f"model.dropout={self.dropout}: must lie in [0, 1)")


@dataclass(kw_only=True)
class Data:
    """A data set by kind, and how it is cut.

    `path` is the file of `jsonl`. `labels` is the fixed list of classes of `code_packages`. `val_percent` of the
    *modules* (for `jsonl` and `synthetic`: of the examples) are the validation split, so the two share no file.
    `max_train` and `max_val` (0: all) cap a split, for smoke runs.
    """

    kind: str = "synthetic"
    path: str | None = None
    labels: list[str] = field(default_factory=list)
    val_percent: int = 15
    min_lines: int = 3
    max_train: int = 0
    max_val: int = 0
    num_examples: int = 512

    def __post_init__(self) -> None:
        _one_of("data.kind", self.kind, tuple(OBJECTIVES))
        if not 1 <= self.val_percent <= 50:
            raise ValueError(f"data.val_percent={self.val_percent}: must lie between 1 and 50")
        for key in ("min_lines", "max_train", "max_val"):
            _at_least(f"data.{key}", getattr(self, key), 0)
        _at_least("data.num_examples", self.num_examples, 2)
        if self.kind == "jsonl" and not self.path:
            raise ValueError("data.path: data=jsonl needs the path of a file, e.g. data.path=alpaca.jsonl")
        if self.kind == "code_packages" and len(self.labels) < 2:
            raise ValueError("data.labels: data=code_packages needs at least two labels")

    @property
    def objective(self) -> str:
        """`causal_lm` or `classification`."""
        return OBJECTIVES[self.kind]


@dataclass(kw_only=True)
class Train:
    """The one training loop. A step is an optimizer step over `global_batch` sequences of `length` tokens.

    The learning rate of a run is `lr_by_method[method.kind] * lr_scale`: it belongs to the method, so that a sweep
    over methods never trains one at another's rate; `lr_scale` is what a sweep over rates varies.
    `threads` 0 means all cores this process may use; it is resolved before the run's id is computed.
    `precision=bf16` with `model.dtype=fp32` means autocast; with `model.dtype=bf16` everything is bf16.
    """

    steps: int = 100
    global_batch: int = 8
    micro_batch: int = 8
    length: int = 128
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
    checkpoint_every: int = 0
    log_every: int = 1
    eval_every: int = 0
    eval_batch: int = 32
    save_final: bool = True
    deterministic: bool = True

    def __post_init__(self) -> None:
        _one_of("train.precision", self.precision, DTYPES)
        _one_of("train.schedule", self.schedule, SCHEDULES)
        _one_of("train.recompute", self.recompute, RECOMPUTE)
        for key in ("steps", "global_batch", "micro_batch", "length", "world", "log_every", "eval_batch"):
            _at_least(f"train.{key}", getattr(self, key), 1)
        for key in ("threads", "checkpoint_every", "eval_every", "warmup_steps", "clip", "weight_decay", "seed"):
            _at_least(f"train.{key}", getattr(self, key), 0)
        for key, rate in {**self.lr_by_method, "lr_scale": self.lr_scale}.items():
            where = "train.lr_scale" if key == "lr_scale" else f"train.lr_by_method.{key}"
            if not rate >= 0:
                raise ValueError(f"{where}={rate}: must not be negative")
        if self.seed >= 2**32:
            raise ValueError(f"train.seed={self.seed}: must be less than 2**32")
        if self.global_batch % (self.micro_batch * self.world):
            raise ValueError(
                f"train.global_batch={self.global_batch}: must be a multiple of "
                f"micro_batch x world = {self.micro_batch} x {self.world}"
            )

    @property
    def accumulation(self) -> int:
        """Micro-batches per rank and optimizer step."""
        return self.global_batch // (self.micro_batch * self.world)


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
        _at_least("method.r", self.r, 1)
        _one_of("method.dtype", self.dtype, ("fp32", "model"))
        if not 0 <= self.dropout < 1:
            raise ValueError(f"method.dropout={self.dropout}: must lie in [0, 1)")


@dataclass(kw_only=True)
class Engine:
    """How ranks share the work. `local` is one rank on one device."""

    kind: str = "local"


@dataclass(kw_only=True)
class Hardware:
    """The device a run is for. `auto` is resolved before the run's id is computed.

    `mem_gib` and `tflops` replace what would be measured, for checks and predictions about another machine.
    """

    device: str = "auto"
    mem_gib: float | None = None
    tflops: float | None = None

    def __post_init__(self) -> None:
        _one_of("hardware.device", self.device, DEVICES)
        for key in ("mem_gib", "tflops"):
            value = getattr(self, key)
            if value is not None and not value > 0:
                raise ValueError(f"hardware.{key}={value}: must be positive")


@dataclass(kw_only=True)
class Dispatch:
    """Where a job runs and when it is given up.

    `timeout_s`: the deadline of the whole run. `heartbeat_s`: no sign of life for so long is a hang (a stopped
    process). `stall_s`: alive, but no step done for so long after an earlier one, is a hang too. `memory_gib` limits
    the process's data segment (RLIMIT_DATA), so that running out of memory can be tried without harm.
    """

    kind: str = "process"
    timeout_s: float = 7 * 24 * 3600.0
    heartbeat_s: float = 60.0
    stall_s: float = 1800.0
    memory_gib: float | None = None

    def __post_init__(self) -> None:
        for key in ("timeout_s", "heartbeat_s", "stall_s", "memory_gib"):
            value = getattr(self, key)
            if value is not None and not value > 0:
                raise ValueError(f"dispatch.{key}={value}: must be positive")


@dataclass(kw_only=True)
class Tracker:
    """Who is told beside the local record. `wandb` is offline unless `mode` or WANDB_MODE says otherwise."""

    kind: str = "none"
    project: str = "llmsys"
    mode: str = "offline"

    def __post_init__(self) -> None:
        _one_of("tracker.mode", self.mode, ("offline", "online", "disabled"))


@dataclass(kw_only=True)
class Profile:
    """What is measured: timings leave the first `warmup` steps out; `probe` counts saved tensors after training."""

    warmup: int = 3
    probe: bool = True

    def __post_init__(self) -> None:
        _at_least("profile.warmup", self.warmup, 0)


@dataclass(kw_only=True)
class Config:
    """One run, whole."""

    name: str = "scratch"
    results: str = "results"
    reuse: str = "same_code"
    force: bool = False
    smoke: list[str] = field(default_factory=list)
    baselines: list[str] = field(default_factory=list)
    task: Task
    model: Model
    data: Data
    train: Train
    method: Method
    engine: Engine
    hardware: Hardware
    dispatch: Dispatch
    tracker: Tracker
    profile: Profile

    def __post_init__(self) -> None:
        _one_of("reuse", self.reuse, ("same_code", "any", "never"))
        if not self.results:
            raise ValueError("results: empty; it is the folder for results, e.g. results=results")
        if not re.fullmatch(r"\w[\w.-]*", str(self.name)) or self.name is None:
            raise ValueError(f"name={self.name}: it names a folder; letters, digits, '_', '-' and '.' only")
        if self.dispatch.kind == "inline" and self.dispatch.memory_gib is not None:
            raise ValueError(
                "dispatch.memory_gib: needs dispatch=process; a living process cannot be limited for a time"
            )
        if self.model.dtype == "bf16" and self.train.precision == "fp32":
            raise ValueError("train.precision=fp32: with model.dtype=bf16 it must be bf16")
        if self.train.length > self.model.max_length:
            raise ValueError(
                f"train.length={self.train.length}: model {self.model.name} takes at most {self.model.max_length}"
            )
        wanted = "classification" if self.model.family == "bert" else "causal_lm"
        if self.data.objective != wanted:
            fitting = [kind for kind, objective in OBJECTIVES.items() if objective == wanted]
            raise ValueError(
                f"data.kind={self.data.kind}: model {self.model.name} ({self.model.family}) trains "
                f"{wanted}: use data={' or data='.join(fitting)}"
            )
        if self.engine.kind == "local" and self.train.world != 1:
            raise ValueError(f"train.world={self.train.world}: engine=local runs on one rank")


SCHEMAS: dict[str, dict[str, type]] = {
    "task": {"*": Task},
    "model": {"*": Model},
    "data": {"*": Data},
    "train": {"*": Train},
    "method": {"full": Method, "majority": Method, "probe": Method, "lora_peft": Adapter, "lorafa_peft": Adapter},
    "engine": {"local": Engine},
    "hardware": {"*": Hardware},
    "dispatch": {"inline": Dispatch, "process": Dispatch},
    "tracker": {"none": Tracker, "wandb": Tracker},
    "profile": {"*": Profile},
}
"""Group -> kind -> the class of its settings; `*` where every choice in the group shares one class."""


def build(plain: dict[str, Any]) -> Config:
    """The typed config of a plain nested dict, as composed by Hydra or read back from a run's `config.yaml`.

    Raises ValueError, naming the dotted key, on an unknown key, an unknown kind or a value that a class refuses.
    """
    if "exp" in plain:
        raise ValueError("exp: the experiment's file must begin with the line '# @package _global_'")
    groups = {}
    for group, kinds in SCHEMAS.items():
        if not isinstance(plain.get(group), dict):
            raise ValueError(f"{group}: missing; it is a group of settings")
        values = plain[group]
        cls = kinds.get("*") or kinds.get(values.get("kind"))
        if cls is None:
            raise ValueError(f"{group}.kind={values.get('kind')}: must be one of {', '.join(kinds)}")
        groups[group] = _make(cls, group + ".", values)
    return _make(Config, "", {**plain, **groups})


def _make(cls: type, prefix: str, values: dict[str, Any]) -> Any:
    known = {f.name for f in dataclasses.fields(cls)}
    for key in values:
        if key not in known:
            near = difflib.get_close_matches(key, known, n=3) or sorted(known)
            raise ValueError(f"{prefix}{key}: no such setting; there are {', '.join(near)}")
    for key, value in values.items():
        for number in value.values() if isinstance(value, dict) else [value]:
            if isinstance(number, float) and not math.isfinite(number):
                raise ValueError(f"{prefix}{key}={number}: must be a finite number")
    return cls(**values)
