"""Machines behind home lines, one of them without torch: whoever is killed, the job learns the same."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from decentral_home import JOB, Homes

import alone
from link_harness import killed
from llmsys.comm import link
from llmsys.decentral.event_log import read
from llmsys.decentral.events import Joined

pytestmark = pytest.mark.slow
Run = Callable[..., subprocess.CompletedProcess[str]]
PLANES = ("torch", "torch", "onnx", "torch")
TFLOPS = (0.05, 0.05, 0.05, 0.02)
"""The last is slower than the others, and so the spare."""
HIT = 3
"""So many steps are committed before somebody is killed."""


@pytest.fixture(autouse=True)
def _lines_can_be_made() -> None:
    if why := link.why_not():
        pytest.skip(why)


def test_a_stage_is_killed_behind_home_lines_and_losses_stay_within_a_thousandth(
    llmsys: Run, results: Path, tmp_path: Path
) -> None:
    """Three stages, one of them on a machine that has no torch, and a spare; all by the commands that users give, with
    certificate and token. `status` shows who has gone, and that the spare has the stage. What losses are compared with
    is a run on torch alone, on this machine, to which nothing happens; it also tells how much memory each has to have,
    so that three hold the job and two do not."""
    python = alone.with_extra("provider", tmp_path / "bare")
    assert subprocess.run([python, "-c", "import torch"], capture_output=True, check=False).returncode != 0
    done = llmsys(*JOB, "task.providers=3", "task.reserve=0")
    assert done.returncode == 0, done.stdout + done.stderr
    expected = record(results)
    events = read(file(results, "events.jsonl"))
    (mem_gib,) = {event.provider.mem_gib for event, _ in events if isinstance(event, Joined)}

    stage, after = -1, list[dict[str, Any]]()
    with Homes(tmp_path / "homes", PLANES) as homes:
        homes.serve("task.providers=4", "task.reserve=1")
        for at, (plane, tflops) in enumerate(zip(PLANES, TFLOPS, strict=True)):
            homes.provide(at, mem_gib, tflops, python if plane == "onnx" else sys.executable)
        for status in homes.watch():
            found = status["providers"]
            if stage >= 0:
                after.append(found)
            elif status["step"] >= HIT:
                assert [found[name]["role"] for name in ("p0", "p1", "p2", "p3")] == ["stage"] * 3 + ["pool"]
                stage = found["p1"]["stage"]
                homes.providers[1].process.kill()
        assert homes.broker.process.wait(60) == 0, homes.said("broker")
        for at, rank in enumerate(homes.providers):
            assert rank.process.wait(10) == (-signal.SIGKILL if at == 1 else 0), homes.said(f"p{at}")

    assert (after[-1]["p1"]["role"], after[-1]["p1"]["stage"]) == ("gone", None)
    assert (after[-1]["p3"]["role"], after[-1]["p3"]["stage"]) == ("stage", stage)
    assert (after[-1]["p2"]["role"], after[-1]["p2"]["plane"]) == ("stage", "onnx")
    made = record(tmp_path / "homes" / "results")
    assert made["summary"]["lost"] == 1
    assert made["summary"]["steps_again"] <= 1
    assert made["samples"]["loss"] == pytest.approx(expected["samples"]["loss"], rel=1e-3)
    assert made["samples"]["loss"] != expected["samples"]["loss"]  # other kernels: a stage was not torch's after all


def test_nothing_is_left_when_their_parent_is_killed(tmp_path: Path) -> None:
    """The broker, the process in which it runs its job, a provider, who asks, and the switch between them."""
    command = [sys.executable, str(Path(__file__).with_name("decentral_home.py")), str(tmp_path)]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as process:
        try:
            assert process.stdout is not None
            pids = json.loads(process.stdout.readline())
            assert len(pids) == 5
            killed(process, pids)
        finally:
            process.kill()


def record(results: Path) -> dict[str, Any]:
    made: dict[str, Any] = json.loads(file(results, "record.json").read_text())
    return made


def file(results: Path, name: str) -> Path:
    """Of the only run there is."""
    (path,) = results.glob(f"*/*/{name}")
    return path
