"""What the tasks of `llmsys.bench` are told."""

from __future__ import annotations

from dataclasses import dataclass

from llmsys.schema.fields import at_least
from llmsys.schema.task import Task


@dataclass(kw_only=True)
class Predicting(Task):
    """A task that predicts what a config would do on `hardware`, and runs nothing of it.

    So it reads no data, needs no process for each rank, and its ranks are those of the machine it is about: unless
    `train.world` is given it is `hardware.devices`, and unless `train.global_batch` is, each rank has one micro-batch.
    `speeds`: a folder or `record.json` of a run of `bench_calibrate`, whose machine is then the one predicted.
    """

    speeds: str | None = None

    def __post_init__(self) -> None:
        if self.speeds == "":
            raise ValueError("task.speeds: empty; it is a run's folder, results/bench_calibrate/<run id>, or "
                             "with goal=serve results/bench_serve_modules/<run id>")  # fmt: skip


@dataclass(kw_only=True)
class Predict(Predicting):
    """Memory by phase and time of a step."""

    kind: str = "bench_predict"


@dataclass(kw_only=True)
class Calibrate(Task):
    """How fast this machine is: each operator for at most `most_s` seconds, and `cells` whole training steps (at most
    two), `steps` times each."""

    kind: str = "bench_calibrate"
    most_s: float = 0.12
    cells: int = 2
    steps: int = 8

    def __post_init__(self) -> None:
        if not self.most_s > 0:
            raise ValueError(f"task.most_s={self.most_s}: must be positive")
        at_least("task.steps", self.steps, 1)
        if self.cells not in (0, 1, 2):
            raise ValueError(f"task.cells={self.cells}: must be 0, 1 or 2")
