"""A tiny run without dispatch: config, context and task. As a program it is a run that kills itself:

python train_harness.py OUT beat:5      SIGKILL after step 5
python train_harness.py OUT rename:4    SIGKILL when the checkpoint of step 4 is written but not yet renamed
"""

from __future__ import annotations

import dataclasses
import logging
import os
import signal
import sys
from pathlib import Path
from typing import Any

import torch

from llmsys import schema, wiring
from llmsys.comm.place import Place
from llmsys.context import Context
from llmsys.track.jsonl import JsonLines, read
from llmsys.train.task import train

RATES = {"full": 1e-3, "lora_peft": 1e-3, "lorafa_peft": 5e-3}
TIMINGS = ("step_ms", "tokens_per_s")


def config(kind: str = "full", family: str = "llama", **overrides: Any) -> schema.Config:
    """A run of seconds. `overrides` are `<group>__<key>=value`, or `<key>=value` of the config itself."""
    method = schema.Adapter(kind=kind, r=4) if "lora" in kind else schema.Method(kind=kind)
    data = schema.Data(num_examples=16)
    if family == "bert":
        data = schema.Data(kind="code_packages", labels=["core", "geometry", "matrices"], max_train=96, max_val=48)
    if family == "t5":
        data = schema.Data(kind="code_docstrings", max_train=32, max_val=16)
    result = schema.Config(
        task=schema.Task(),
        model=schema.Transformer(family=family, tie_embeddings=family == "t5"),
        data=data,
        train=schema.Train(steps=6, length=32, lr_by_method=dict(RATES)),
        method=method,
        engine=schema.Engine(),
        hardware=schema.Hardware(device="cpu", tflops=0.1),
        network=schema.Network(),
        dispatch=schema.Dispatch(),
        tracker=schema.Tracker(),
        profile=schema.Profile(warmup=1),
    )
    for name, value in overrides.items():
        group, _, key = name.rpartition("__")
        if group:
            value = dataclasses.replace(getattr(result, group), **{key: value})
        result = dataclasses.replace(result, **{group or key: value})
    return result


def context(out: Path, config: schema.Config, **overrides: Any) -> Context:
    """What the runner would hand to the task, on one CPU thread."""
    out.mkdir(parents=True, exist_ok=True)
    parts: dict[str, Any] = {
        "out": out,
        "device": torch.device("cpu"),
        "threads": 1,
        "code_hash": "of this code",
        "log": logging.getLogger("llmsys.test"),
        "method": wiring.method(config.method),
        "engine": wiring.engine(config, Place(), torch.device("cpu")),
        "grad_sync": wiring.grad_sync(config),
        "metrics": JsonLines(out / "metrics.jsonl"),
    }
    return Context(**{**parts, **overrides})


def run(out: Path, config: schema.Config, **overrides: Any) -> dict[str, Any]:
    """Trains into `out`; returns the task's result."""
    return train(config, context(out, config, **overrides))


def curve(out: Path) -> list[dict[str, Any]]:
    """The rows of `metrics.jsonl` without what depends on the clock."""
    return [{k: v for k, v in row.items() if k not in TIMINGS} for row in read(out / "metrics.jsonl")]


def resumable() -> schema.Config:
    """A run whose every random stream matters: dropout in the adapters, evaluation and checkpoints on the way."""
    return config(
        "lora_peft",
        method__dropout=0.1,
        train__steps=8,
        train__checkpoint_every=2,
        train__eval_every=3,
        train__schedule="cosine",
        train__weight_decay=0.1,
    )


def _die(out: Path, moment: str) -> None:
    what, _, step = moment.partition(":")

    def listen(progress: dict[str, Any]) -> None:
        if what == "beat" and progress.get("step") == int(step):
            os.kill(os.getpid(), signal.SIGKILL)

    rename = os.rename

    def guarded(source: Any, target: Any) -> None:
        if what == "rename" and str(target).endswith(f"step-{int(step):08d}"):
            os.kill(os.getpid(), signal.SIGKILL)
        rename(source, target)

    os.rename = guarded
    run(out, resumable(), listener=listen)


if __name__ == "__main__":
    _die(Path(sys.argv[1]), sys.argv[2])
