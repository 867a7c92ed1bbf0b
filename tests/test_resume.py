"""Claims about `train.resume`: what is wrong with the folder is said in one line that names it, before a run starts."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml

from llmsys import compose, resume
from llmsys.train import checkpoint

STEP = "checkpoint/step-00000040"
TENSORS, STATE = f"{STEP}/rank-0.safetensors", f"{STEP}/state.json"


@pytest.fixture
def run(tmp_path: Path) -> Path:
    """What an interrupted run has left, one of an hour's training say, in small."""
    checkpoint.save(tmp_path / "checkpoint", 40, {"w": torch.ones(64)}, {}, {}, device=torch.device("cpu"))
    (tmp_path / "config.yaml").write_text(yaml.safe_dump(config(tmp_path)))
    return tmp_path


def config(run: Path, *overrides: str) -> dict[str, Any]:
    return compose.compose(["train.steps=80", f"train.resume={run}", *overrides])


def test_its_newest_checkpoint_is_found(run: Path) -> None:
    assert resume.source(config(run)) == (run / STEP, f"{run.name}/40")


def test_of_a_finished_run_it_is_the_last(run: Path) -> None:
    """Not the best, which may be much earlier."""
    (run / "checkpoint").rename(run / "last")
    checkpoint.save(run / "earlier", 20, {"w": torch.ones(64)}, {}, {}, device=torch.device("cpu"))
    (run / "earlier" / "step-00000020").rename(run / "best")
    assert resume.source(config(run)) == (run / "last" / "step-00000040", f"{run.name}/40")


def test_a_run_without_checkpoints_is_told_from_another_folder(run: Path) -> None:
    shutil.rmtree(run / "checkpoint")
    with pytest.raises(ValueError, match=r"no checkpoint there; .* train\.checkpoint_every and train\.save_final"):
        resume.source(config(run))
    (run / "config.yaml").unlink()
    with pytest.raises(ValueError, match=r"no checkpoint there; it is a run's folder, results/"):
        resume.source(config(run))


def flip(content: bytes) -> bytes:
    return content[:-2] + bytes([content[-2] ^ 1]) + content[-1:]


@pytest.mark.parametrize(
    ("file", "spoil"),
    [
        (STATE, lambda _: b"{"),
        (STATE, lambda _: b"[]"),
        (STATE, lambda _: b""),
        (STATE, lambda content: content.replace(b"40", b"41")),
        (f"{STEP}/rank-0.json", lambda _: b"{"),
        (f"{STEP}/rank-0.json", None),
        (TENSORS, None),
        (TENSORS, lambda _: b""),
        (TENSORS, lambda content: content[:-16]),
        (TENSORS, lambda content: bytes(len(content))),
        (TENSORS, flip),
        ("config.yaml", lambda _: b"{"),
        ("config.yaml", lambda _: b"[]"),
        ("config.yaml", lambda _: b"name: x"),
        ("config.yaml", None),
    ],
)
def test_damage_is_named_at_once(run: Path, file: str, spoil: Callable[[bytes], bytes] | None) -> None:
    """Ranks and a model took 15 s to come to it."""
    path = run / file
    if spoil is None:
        path.unlink()
    else:
        path.write_bytes(spoil(path.read_bytes()))
    with pytest.raises(ValueError, match=rf"^train\.resume={run}: .*{path.name}") as told:
        resume.source(config(run))
    text = str(told.value)
    assert "\n" not in text
    if file != "config.yaml":
        assert "remove step-00000040" in text


def test_what_takes_long_to_read_is_left_to_the_ranks(run: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of a large checkpoint the small files and the tensors' headers are read, as of the weights a run starts from."""
    monkeypatch.setattr(resume, "AT_ONCE_BYTES", 100)
    path = run / TENSORS
    content = path.read_bytes()
    path.write_bytes(flip(content))
    assert resume.source(config(run)) is not None
    path.write_bytes(content[:-16])
    with pytest.raises(ValueError, match=path.name):
        resume.source(config(run))


def test_a_checkpoint_of_another_model_is_refused(run: Path) -> None:
    with pytest.raises(ValueError, match=r"was made with model\.num_layers="):
        resume.source(config(run, "model.num_layers=5"))
    assert json.loads((run / STATE).read_text())["step"] == 40
    with pytest.raises(ValueError, match=r"^train\.steps=40: .*has done 40 already"):
        resume.source(config(run, "train.steps=40"))
