"""What the tasks of `llmsys.bench` are told."""

from __future__ import annotations

from dataclasses import dataclass

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
            raise ValueError("task.speeds: empty; it is a run's folder, results/bench_calibrate/<run id>")


@dataclass(kw_only=True)
class Predict(Predicting):
    """Memory by phase and time of a step."""

    kind: str = "bench_predict"
