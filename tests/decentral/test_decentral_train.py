"""The experiments, as a user runs them: a model trained by processes, one of which is killed."""

from __future__ import annotations

import json
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

Run = Callable[..., subprocess.CompletedProcess[str]]
SMALL = (
    *("train.steps=8", "train.global_batch=4", "train.micro_batch=2", "train.length=32", "train.warmup_steps=1"),
    *("model.num_layers=2", "data.max_train=40", "data.max_val=2", "train.log_every=1"),
)
QUIET = ("task.faults=[]",)


def record(results: Path, exp: str, done: subprocess.CompletedProcess[str], at: int = -1) -> dict[str, Any]:
    assert done.returncode == 0, done.stdout + done.stderr
    found = sorted((results / exp).glob("*/record.json"), key=lambda path: path.stat().st_mtime)
    made: dict[str, Any] = json.loads(found[at].read_text())
    return made


@pytest.mark.slow
def test_a_provider_is_killed_and_the_run_is_that_of_one_that_was_alone(llmsys: Run, results: Path) -> None:
    """And all of it is checked, as far as there is somebody to do that."""
    storm = (
        *SMALL,
        "task.providers=4",
        "task.stages=2",
        "task.faults=[stage1 SIGKILL 3]",
        "task.checks=1",
        "task.reserve=2",
    )
    hit = record(results, "decentral_train", llmsys("+exp=decentral_train", *storm))
    alone = (*SMALL, *QUIET, "task.providers=1", "task.stages=1", "task.reserve=0")
    quiet = record(results, "decentral_train", llmsys("+exp=decentral_train", *alone))
    assert hit["samples"]["loss"] == quiet["samples"]["loss"]
    assert hit["summary"]["val_loss"] == quiet["summary"]["val_loss"]
    assert (hit["summary"]["lost"], quiet["summary"]["lost"]) == (1, 0)
    assert hit["summary"]["steps"] == 8
    assert hit["summary"]["checked"] > 0
    assert (hit["summary"]["cheats"], hit["summary"]["undecided"]) == (0, 0)
    assert hit["summary"]["steps_again"] <= 1
    assert hit["summary"]["plans"] == quiet["summary"]["plans"] + 1


@pytest.mark.slow
def test_it_learns_what_the_one_trainer_does(llmsys: Run, results: Path) -> None:
    """Weights of micro-batches, rate, clipping and decay are those of `llmsys.train`; sums are in another order."""
    common = (*SMALL, "method=lorafa", "train.weight_decay=0.1", "train.clip=0.5", "model.weights=random")
    hit = record(results, "decentral_finetune", llmsys("+exp=decentral_finetune", *common, *QUIET, "task.reserve=0"))
    plain = record(results, "lorafa_llama_6m", llmsys("+exp=lorafa_llama_6m", *common, "train.schedule=linear",
                                                      "train.threads=1", "train.checkpoint_every=0"))  # fmt: skip
    assert hit["summary"]["val_loss"] == pytest.approx(plain["summary"]["val_loss"], rel=1e-4)
    assert hit["summary"]["loss"] == pytest.approx(plain["summary"]["loss"], rel=1e-4)
    assert hit["summary"]["trainable_params"] == plain["summary"]["trainable_params"]


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["task.faults=[p1 SIGFPE 3]"], "task.faults=p1 SIGFPE 3: must be a provider, SIGKILL, SIGSTOP or SIGTERM"),
        (["model.dtype=bf16", "train.precision=bf16"], "model.dtype=bf16: decentral_train is for model.dtype=fp32"),
        (["task.start=none"], "task.start=none: whoever dials in has to know task.listen's port and task.token_file"),
        (["task.start=ray", "task.direct=true", "task.faults=[]"], "task.direct=true: is for task.start=process"),
        *(
            pytest.param(*each, marks=pytest.mark.slow)
            for each in (
                (["task.stages=9"], "task.stages=9: task.providers=4 are fewer"),
                (["task.checks=5"], "task.checks=5.0: must be a share, of 0 to 1"),
                (["task.checks=0.1", "task.owner_keeps=false"], "task.checks=0.1: begin with the owner's copies"),
                (["task.noise=0.5"], "task.noise=0.5: needs task.private, which says whose states it hides: [1,1]"),
                (["task.planes=[cobol]"], "task.planes=cobol: must be one of torch, torch_compiled, onnx"),
            )
        ),
    ],
)
def test_a_mistake_is_one_line(llmsys: Run, words: list[str], said: str) -> None:
    done = llmsys("+exp=decentral_train", *words)
    assert done.returncode == 1
    (line,) = done.stderr.strip().splitlines()
    assert said in line


@pytest.mark.slow
def test_where_too_few_are_left_of_those_that_were_started_the_run_ends_and_says_so(llmsys: Run, results: Path) -> None:
    """Nobody else can come."""
    done = llmsys("+exp=decentral_train", "smoke=true", "train.steps=40", "task.providers=2", "task.stages=2",
                  "task.reserve=0", "task.faults=[stage1 SIGKILL 3]")  # fmt: skip
    assert done.returncode == 1
    assert "gone, and the other providers do not hold the job" in done.stdout + done.stderr
