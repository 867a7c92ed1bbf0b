"""Claims about a measurement that is broken off: what it has finished is not measured again, unless that misleads."""

from __future__ import annotations

import json
import logging
import math
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

import rank_runs
from llmsys.comm.place import Place
from llmsys.compress.kernels_cost import Rates
from llmsys.compress.measure import fit, turns
from llmsys.compress.measure.rounds import Rounds
from llmsys.compress.measure.turns import Samples
from llmsys.compress.measure.variants import Variant
from llmsys.cost.links import Line
from rank_pool import Pool

SMALL = ["+exp=compress_iteration", "network=none", "task.width=32", "task.layers=1", "task.rounds=2", "task.steps=2"]
SMALL += ["task.methods=[none]", "task.bucket_mib=[4]", "task.batch=[1]"]
VARIANTS = 2
"""`noop` and `none`: the turns of a round."""


def attempt(place: Place, results: str, overrides: list[str], most: int = 1000) -> dict[str, Any]:
    """One rank of a run that is interrupted when it has had `most` turns; how many it began, and whether it measured
    the fit."""
    began, fitted = [0], []
    real = turns.turn, fit.lines, fit.rates

    def turn(*arguments: Any, **named: Any) -> None:
        if began[0] == most:
            raise KeyboardInterrupt  # what a signal is between two steps
        began[0] += 1
        real[0](*arguments, **named)

    def lines(*_: Any) -> dict[str, Line]:
        fitted.append(True)
        return {"all_reduce": Line(1e-5, 8e-9)}  # what links really do is not asked here

    turns.turn, fit.lines = turn, lines
    fit.rates = lambda *_: Rates(flops_per_s=math.inf, bytes_per_s=1e9, launch_s=0.0)
    try:
        made = rank_runs.run(place, results, overrides)
    finally:
        turns.turn, fit.lines, fit.rates = real
    return {**made, "began": began[0], "fitted": bool(fitted)}


def test_finished_rounds_are_taken_up_by_the_next_attempt(pool: Pool, tmp_path: Path) -> None:
    """The first is interrupted in its second round: one of two is kept, and the fit. The record says of how many
    attempts it is; a run that is asked for again when all is finished is measured again."""
    where = "test_compress_rounds:attempt"
    first, _ = pool.call(where, str(tmp_path), SMALL, VARIANTS + 1)
    assert first["status"] == "interrupted"
    assert "1 of 2 rounds are kept; the same command goes on with them" in first["error"]
    file = Path(first["out"]) / "rounds.json"
    kept = json.loads(file.read_text())
    second, other = pool.call(where, str(tmp_path), SMALL)
    assert second["status"] == "ok", second["error"]
    assert (second["began"], second["fitted"], other["fitted"]) == (VARIANTS, False, False)
    assert second["summary"]["measured_in_attempts"] == 2
    samples = json.loads((Path(second["out"]) / "record.json").read_text())["samples"]
    for name, own in kept["rounds"][0]["samples"].items():
        of_first, of_second = samples[f"{name}/pair_ms"]
        assert of_first == pytest.approx(1e3 * own["step_s"][0][0], abs=1e-4) != of_second
    assert second["summary"]["fit/all_reduce/alpha_us"] == pytest.approx(10)
    assert "Of 2 attempts" in (Path(second["out"]) / "measured.md").read_text()
    assert not file.exists()
    third, _ = pool.call(where, str(tmp_path), [*SMALL, "reuse=never"])
    assert (third["began"], third["summary"]["measured_in_attempts"]) == (2 * VARIANTS, 1)


def rounds(out: Path, **other: Any) -> Rounds:
    """Of an attempt, with what it is on."""
    context: Any = SimpleNamespace(
        out=out,
        place=Place(),
        device=torch.device("cpu"),
        code_hash=other.pop("code_hash", "c0de"),
        env={"host": "here", "git_dirty": False, "network": {"shaped": True, "address": "10.0.0.1"}, **other},
        log=logging.getLogger("llmsys"),
        kept="",
        beat=lambda **_: None,
    )
    return Rounds(context, 3)


NOOP = Variant("noop", 4, True, 4, 32)
ROUND = {NOOP: Samples(step_s=[[0.1, 0.2]], buckets=[["a", "b"]])}


def test_a_round_comes_back_as_it_was(tmp_path: Path) -> None:
    rounds(tmp_path).add("bert", ROUND)
    again = rounds(tmp_path, git_dirty=True, network={"shaped": True, "address": "10.0.0.2"})
    assert again.of("bert") == [ROUND]
    assert again.of("resnet50") == []


@pytest.mark.parametrize(
    "other", [{"code_hash": "beef"}, {"host": "there"}, {"network": {"shaped": False}}, {"packages": {"torch": "2"}}]
)
def test_rounds_of_another_code_machine_or_link_are_not_mixed_in(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, other: dict[str, Any]
) -> None:
    rounds(tmp_path).add("", ROUND)
    assert rounds(tmp_path, **other).count == 0
    assert "all rounds are measured anew" in caplog.text


@pytest.mark.parametrize("text", ["{", "[]", "{}"])
def test_a_damaged_file_of_rounds_is_noticed(tmp_path: Path, caplog: pytest.LogCaptureFixture, text: str) -> None:
    (tmp_path / "rounds.json").write_text(text)
    assert rounds(tmp_path).count == 0
    assert "damaged" in caplog.text
