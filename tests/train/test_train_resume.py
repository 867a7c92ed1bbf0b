"""A run killed at any moment and started again gives the curve of an undisturbed one, bit for bit."""

from __future__ import annotations

import json
import logging
import os
import resource
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import train_harness as harness

from llmsys.train import checkpoint, optimizer
from llmsys.train.saver import Saver
from llmsys.train.watch import Watch


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("undisturbed")
    harness.run(out, harness.resumable())
    return out


def save(folder: Path, step: int, w: torch.Tensor) -> None:
    """A checkpoint of one tensor, by one rank."""
    checkpoint.save(folder, step, {"w": w}, {}, {}, device=torch.device("cpu"))


def load(folder: Path) -> checkpoint.Reader:
    """The newest one."""
    return checkpoint.Reader(checkpoint.found(folder)[0], rank=0)


def killed(out: Path, moment: str) -> None:
    """Runs the harness in a process of its own until it kills itself."""
    command = [sys.executable, harness.__file__, str(out), moment]
    done = subprocess.run(command, check=False, capture_output=True, timeout=120)
    assert done.returncode == -signal.SIGKILL, done.stderr.decode()


@pytest.mark.parametrize(
    ("moment", "resumes_at"),
    [
        ("rename:4", 3),
        pytest.param("beat:5", 4, marks=pytest.mark.slow),
        pytest.param("beat:1", None, marks=pytest.mark.slow),
    ],
)
def test_killed_and_started_again(tmp_path: Path, undisturbed: Path, moment: str, resumes_at: int | None) -> None:
    """Between checkpoints; while one is written but not yet renamed (the one before serves: step 3's, whose evaluation
    was the best so far); before the first."""
    killed(tmp_path, moment)
    result = harness.run(tmp_path, harness.resumable())
    assert harness.curve(tmp_path) == harness.curve(undisturbed)
    weights = "weights/adapter_model.safetensors"
    assert (tmp_path / weights).read_bytes() == (undisturbed / weights).read_bytes()
    assert result["resumed_from_step"] == resumes_at
    assert len(result["samples"]["step_ms"]) == 8 - (resumes_at or 0) - 1, "timings of the steps after resuming only"


@pytest.mark.parametrize("change", ["code_hash", "run_id"])
def test_a_checkpoint_of_something_else_is_set_aside(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, change: str
) -> None:
    """Else a run would silently mix two programs or two settings."""

    def stop(progress: dict[str, float]) -> None:
        if progress.get("step") == 5:
            raise KeyboardInterrupt

    out = tmp_path / "run"
    with pytest.raises(KeyboardInterrupt):
        harness.run(out, harness.resumable(), listener=stop)
    code = "of this code"
    if change == "code_hash":
        code = "of other code"
    else:
        out = out.rename(tmp_path / "another run's id")
    with caplog.at_level(logging.WARNING):
        assert harness.run(out, harness.resumable(), code_hash=code)["resumed_from_step"] is None
    assert f"of another {change}" in caplog.text
    assert list((out / "checkpoint.old").glob("step-*")), "edited code must not cost a long run's checkpoint"
    assert [row["step"] for row in harness.curve(out) if "loss" in row] == list(range(1, 9))


@pytest.mark.parametrize(
    "damage",
    [
        *("state.json", "rank-0.json", "rank-0.safetensors", "metrics", "metrics byte"),
        *("state.json bit", "rank-0.json bit", "rank-0.safetensors bit"),
    ],
)
def test_a_damaged_checkpoint_or_curve_starts_again(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, damage: str
) -> None:
    """Never a curve with a hole in it, and never a run that can't be started any more."""

    def stop(progress: dict[str, float]) -> None:
        if progress.get("step") == 5:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        harness.run(tmp_path, harness.resumable(), listener=stop)
    metrics = tmp_path / "metrics.jsonl"
    if damage == "metrics":
        metrics.write_text("".join(metrics.read_text().splitlines(keepends=True)[:2]))
    elif damage == "metrics byte":
        metrics.write_bytes(metrics.read_bytes().replace(b"loss", b"lo\xffs", 1))
    else:
        path = tmp_path / "checkpoint" / "step-00000004" / damage.removesuffix(" bit")
        content = path.read_bytes()
        path.write_bytes(flipped(content, "safetensors" in damage) if damage.endswith("bit") else content[:-40])
    with caplog.at_level(logging.WARNING):
        resumed = harness.run(tmp_path, harness.resumable())["resumed_from_step"]
    if "metrics" in damage:
        assert resumed is None
        assert "training begins at step 0" in caplog.text
        assert (tmp_path / "checkpoint.old").is_dir()
    else:
        assert resumed == 3, "the one before, which was kept as the best"
        assert "damaged" in caplog.text
    assert [row["step"] for row in harness.curve(tmp_path) if "loss" in row] == list(range(1, 9))


def flipped(content: bytes, tensors: bool) -> bytes:
    """With one other bit: of the last number of the tensors, or of a digit of JSON, which is a digit still."""
    digits = [place for place, byte in enumerate(content) if chr(byte).isdigit()]
    place = len(content) - 3 if tensors else digits[len(digits) // 2]
    return content[:place] + bytes([content[place] ^ 1]) + content[place + 1 :]


def test_another_run_s_checkpoint_is_not_gone_on_from_where_it_is_damaged(tmp_path: Path) -> None:
    """There is no curve to begin again: one line says what can be done. One of older code, without sums, is read."""
    save(tmp_path / "checkpoint", 4, torch.ones(8))
    path = tmp_path / "checkpoint" / "step-00000004"
    config = harness.config(train__resume="there")
    saver = Saver(config, harness.context(tmp_path / "run", config, inputs={"resume": str(path)}), Watch(config.train))
    tensors = path / "rank-0.safetensors"
    tensors.write_bytes(flipped(tensors.read_bytes(), True))
    with pytest.raises(
        ValueError, match=r"^train\.resume=there: .*step-00000004: damaged: rank-0\.safetensors is .*"
    ) as told:
        saver.find()
    assert "\n" not in str(told.value)
    state = json.loads((path / "state.json").read_text())
    del state["crc32"]
    (path / "state.json").write_text(json.dumps(state))
    checkpoint.Reader(path, 0).verify()


def test_full_disk_leaves_the_previous_checkpoint(tmp_path: Path) -> None:
    """The error that travels is an OSError, so that the runner can call it by its name."""
    folder = tmp_path / "checkpoint"
    save(folder, 1, torch.ones(8))
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, hard))
    try:
        with pytest.raises(OSError, match="File too large"):
            save(folder, 2, torch.ones(1_000_000))
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert [path.name for path in folder.iterdir()] == ["step-00000001"]
    assert torch.equal(load(folder).get("w"), torch.ones(8))


@pytest.mark.parametrize("call", ["mkdir", "fsync", "rename", "rmtree"])
def test_a_crash_at_any_call_leaves_a_loadable_checkpoint(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, call: str
) -> None:
    """Every system call at which a kill can fall, the removal of the older checkpoint included."""
    folder = tmp_path / "checkpoint"
    save(folder, 1, torch.ones(8))

    class Killed(BaseException):
        pass

    def kill(*_: object, **__: object) -> None:
        raise Killed

    owner = {"mkdir": Path, "fsync": os, "rename": os, "rmtree": checkpoint.shutil}[call]
    with monkeypatch.context() as patch:
        patch.setattr(owner, call, kill)
        with pytest.raises(Killed):
            save(folder, 2, torch.full((8,), 2.0))
    loaded = load(folder)
    assert torch.equal(loaded.get("w"), torch.full((8,), float(loaded.shared["step"])))
    save(folder, 3, torch.ones(8))
    assert [path.name for path in folder.iterdir()] == ["step-00000003"], "the next one sweeps up"


def test_a_finished_run_is_gone_on_from_with_the_same_bits(tmp_path: Path) -> None:
    """More steps of a run that was saved, and that took checkpoints, are those of one that had as many at once; a
    checkpoint of its last step is there though that is no multiple of checkpoint_every."""
    settings = {"method__dropout": 0.1, "train__checkpoint_every": 3, "train__schedule": "constant"}
    whole, short, more = (tmp_path / name for name in ("whole", "short", "more"))
    harness.run(whole, harness.config("lora_peft", **settings, train__steps=10))
    result = harness.run(short, harness.config("lora_peft", **settings, train__steps=7))
    assert result["files"]["last_checkpoint"] == "last"
    (last,) = (short / "last").iterdir()
    config = harness.config("lora_peft", **settings, train__steps=10, train__resume=str(short))
    assert harness.run(more, config, inputs={"resume": str(last)})["resumed_from_step"] == 7
    assert harness.curve(more) == [row for row in harness.curve(whole) if row["step"] > 7]


@pytest.mark.parametrize("without", [{"train__save_final": False}, {"train__checkpoint_every": 0}])
def test_a_run_that_is_not_to_be_saved_leaves_no_checkpoint(tmp_path: Path, without: dict[str, object]) -> None:
    """A checkpoint is three times the weights: the cells of a sweep do not leave one each."""
    result = harness.run(tmp_path, harness.config(**{"train__checkpoint_every": 2, **without}))
    assert "last_checkpoint" not in result["files"]
    assert not list(tmp_path.rglob("step-*"))


def test_the_last_and_the_best_checkpoint_stay(tmp_path: Path) -> None:
    """Validation is best at step 2, since from step 3 on the rate is absurd: its checkpoint outlives later ones."""
    seen: dict[int, list[str]] = {}
    config = harness.config(train__steps=8, train__checkpoint_every=1, train__eval_every=1, train__schedule="constant")

    def look(progress: dict[str, float]) -> None:
        if "loss" in progress:
            seen[int(progress["step"])] = sorted(path.name for path in (tmp_path / "checkpoint").glob("step-*"))

    context = harness.context(tmp_path, config, listener=look)
    rates = iter([1e-2, 1e-2, *[3.0] * 6])
    loop_rate = optimizer.schedule
    try:
        optimizer.schedule = lambda _: lambda step: next(rates) / 1e-3  # type: ignore[assignment]
        result = harness.train(config, context)
    finally:
        optimizer.schedule = loop_rate
    assert seen[5] == ["step-00000002", "step-00000004"]
    assert seen[8] == ["step-00000002", "step-00000007"]
    assert result["files"]["best_checkpoint"] == "best"
    kept = checkpoint.Reader(tmp_path / "best", rank=0)
    assert kept.shared["step"] == 2
    assert [path.name for path in (tmp_path / "last").iterdir()] == ["step-00000008"]
    assert not (tmp_path / "checkpoint").exists(), "a run made again begins at its beginning"
