"""Claims about what long runs meet: a loss that is not finite, and one that jumps."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
import train_harness as harness

from llmsys import schema
from llmsys.errors import NotANumber
from llmsys.train.engines import local
from llmsys.train.watch import LEAST, Watch

NAN = math.nan


def poison(monkeypatch: pytest.MonkeyPatch, steps: set[int]) -> None:
    """The gradient of these steps becomes infinite, between the backward pass and the update."""
    done = [0]
    original = local.Local.step

    def step(self: local.Local, sums: torch.Tensor, max_norm: float) -> tuple[list[float], float]:
        done[0] += 1
        if done[0] in steps:
            self.trained[0].grad[:] = math.inf  # type: ignore[index]
        return original(self, sums, max_norm)

    monkeypatch.setattr(local.Local, "step", step)


def losses(out: Path) -> list[float | None]:
    return [row["loss"] for row in harness.curve(out) if "loss" in row]


def test_a_step_that_is_not_finite_is_left_out_where_that_is_asked_for(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The run goes on as if the step had not been: the next one's loss is that of the same weights."""
    poison(monkeypatch, {3})
    result = harness.run(tmp_path, harness.config(train__on_nan="skip"))
    rows = [row for row in harness.curve(tmp_path) if "grad_norm" in row]
    assert [row.get("skipped", False) for row in rows] == [False, False, True, False, False, False]
    assert rows[2]["grad_norm"] is None, "a curve is JSON, which has no infinity"
    assert result["summary"]["skipped_steps"] == 1
    assert all(math.isfinite(row["loss"]) for row in rows)


def test_a_run_may_end_with_a_step_that_is_left_out(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What it reports is the loss of the last step that counted."""
    poison(monkeypatch, {6})
    result = harness.run(tmp_path, harness.config(train__on_nan="skip"))
    assert math.isfinite(result["summary"]["loss"])
    assert result["summary"]["skipped_steps"] == 1


def test_by_default_it_ends_the_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    poison(monkeypatch, {3})
    with pytest.raises(NotANumber, match="step 3: the norm of the gradient is inf"):
        harness.run(tmp_path, harness.config())
    assert len(losses(tmp_path)) == 2


def test_patience_ends_after_so_many_in_a_row(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    poison(monkeypatch, {2, 3, 4})
    with pytest.raises(NotANumber, match=r"step 4: .* after 2 skipped steps in a row"):
        harness.run(tmp_path, harness.config(train__on_nan="skip", train__max_skips=2))


def test_a_jump_is_noted_once_enough_is_known() -> None:
    watch = Watch(schema.Train(spike_factor=3.0))
    assert watch.see(1, 2.0, 1.0) == ""
    assert watch.see(2, 9.0, 1.0) == "", "two losses say nothing about what is usual"
    for step in range(3, LEAST + 3):
        assert watch.see(step, 2.0, 1.0) == ""
    assert watch.see(40, 5.9, 1.0) == ""
    assert watch.see(41, 6.1, 1.0) == "spike"
    assert watch.summary == {"skipped_steps": 0, "loss_spikes": 1}


def test_a_resumed_watch_is_the_same_watch() -> None:
    """Its state is JSON; in a row means across the interruption too."""
    config = schema.Train(on_nan="skip", max_skips=2)
    first, second = Watch(config), Watch(config)
    for step in range(1, 30):
        first.see(step, 2.0 + step / 100, 1.0)
    first.see(30, NAN, 1.0)
    state: dict[str, Any] = json.loads(json.dumps(first.state()))
    second.load_state(state)
    assert second.state() == first.state()
    assert second.see(31, NAN, NAN) == "skipped"
    with pytest.raises(NotANumber):
        second.see(32, NAN, NAN)
