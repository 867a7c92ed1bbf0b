"""What the tasks are told that say what to change: which combination of techniques, and which module."""

from __future__ import annotations

from dataclasses import dataclass, field

from llmsys.schema.bench import Predicting
from llmsys.schema.fields import at_least, one_of
from llmsys.schema.modules import Modules

GOALS = ("throughput", "fit", "batch", "cost", "serve")
STAGES = ("pretrain", "finetune")


@dataclass(kw_only=True)
class Advise(Predicting):
    """Which combination of techniques to choose on `hardware`.

    `goal`: `throughput`, most tokens a second of all devices together; `fit`, least memory of a device, at the smallest
    micro-batch; `batch`, most examples in a step without accumulating any; `cost`, least for a token, also on fewer
    devices than there are (1, 2, 4, ...).
    `stage`: `pretrain` allows what trains every weight, `finetune` adapters too. A 4-bit base without an adapter trains
    no linear weight, and is left out of both. What is fine-tuned on are padded rows as long as Alpaca's, unless `data`
    is given.
    `letters` (`llmsys.bench.techniques`) are combined; empty: all, with tensor parallelism over all ranks. `require`:
    letters that a combination must have.
    `micro_batches`: those to choose among; empty: searched, up to `most_micro_batch`, and the answer says where that
    has ended the search. `global_batch`: examples of a step, for which micro-batches are accumulated; 0: as many as
    micro-batch and ranks make. Typed as `train.micro_batch` and `train.global_batch` they are taken from there.
    With `serve` the question is which hardware, tensor parallelism and weights serve the model at the most tokens a
    second: requests of `prompt_tokens` and `output_tokens`, whose first token has to come in `slo_ttft_ms`, and each
    further one in `slo_tpot_ms`; 0: whenever. With `hardware=auto` all cards that are known are asked about; with
    `speeds`, then a run of `bench_serve_modules`, its machine alone.
    `records`: a folder with runs of the task `train`, of which those that are this model on this machine take the place
    of predictions; null: the folder `results`. `emit`: a folder for what to run, written anew each time.
    """

    kind: str = "bench_advise"
    goal: str = "throughput"
    stage: str = "pretrain"
    letters: list[str] = field(default_factory=list)
    require: list[str] = field(default_factory=list)
    micro_batches: list[int] = field(default_factory=list)
    most_micro_batch: int = 512
    global_batch: int = 0
    prompt_tokens: int = 512
    output_tokens: int = 256
    slo_ttft_ms: float = 0.0
    slo_tpot_ms: float = 0.0
    records: str | None = None
    emit: str | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        one_of("task.goal", self.goal, GOALS)
        one_of("task.stage", self.stage, STAGES)
        for key in ("prompt_tokens", "output_tokens"):
            at_least(f"task.{key}", getattr(self, key), 1)
        for key in ("slo_ttft_ms", "slo_tpot_ms"):
            at_least(f"task.{key}", getattr(self, key), 0)
        at_least("task.most_micro_batch", self.most_micro_batch, 1)
        at_least("task.global_batch", self.global_batch, 0)
        for size in self.micro_batches:
            at_least("task.micro_batches", size, 1)
        for key in ("records", "emit"):
            if getattr(self, key) == "":
                raise ValueError(f"task.{key}: empty; it is a folder")


@dataclass(kw_only=True)
class Opportunities(Modules):
    """Where a step's time could be saved: each module's against its roofline.

    `modules`: a folder or `record.json` of a run of `bench_modules`, of which the model, the settings and the device
    are then taken; null: the modules are measured here and now, with this run's `rounds` and `warmup`. `changes`:
    measure also what the changes that are known would take instead. `verify`: and make each of them, to see what it
    really saves.
    """

    kind: str = "bench_opportunities"
    modules: str | None = None
    changes: bool = True
    verify: bool = False

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.modules == "":
            raise ValueError("task.modules: empty; it is a run's folder, results/bench_modules/<run id>")
