"""A machine's share of its peak: fitted, measured here, and read back as a fleet."""

from __future__ import annotations

from pathlib import Path

import pytest

from llmsys import compose, job, runner
from llmsys.decentral import fleet_file, profile_task

SMALL = ("+exp=decentral_profile", "model=llama_tiny", "train.length=64", "train.threads=1", "task.rounds=3")


def test_a_machine_that_keeps_to_its_share_is_found_exactly() -> None:
    flops = [1e12, 2e12, 3.5e12]
    assert profile_task.fitted(flops, [each / (0.4 * 2e12) for each in flops], 2e12) == pytest.approx(0.4)


def test_times_that_are_as_far_off_above_as_below_are_in_the_middle() -> None:
    """By shares of the times: ratios of 0.9 and 1.1 to what half of the peak would take."""
    seconds = [1 / 0.9, 1 / 1.1]
    assert profile_task.fitted([0.5, 0.5], seconds, 1.0) == pytest.approx(0.5, rel=0.02)


@pytest.mark.parametrize("train", [pytest.param("true", marks=pytest.mark.slow), "false"])
def test_the_entry_is_a_fleet_of_this_machine(tmp_path: Path, train: str) -> None:
    lines = ("network.name=home", "network.up_mbit=20", "network.down_mbit=100", "task.provider=anna")
    made = job.make(compose.compose([*SMALL, *lines, f"task.train={train}", f"results={tmp_path}"]))
    record = runner.run(made)
    assert record.status == "ok", record.error
    (only,) = fleet_file.read(Path(made.out) / record.files["provider"]).providers
    assert (only.name, only.up_mbit, only.down_mbit) == ("anna", 20, 100)
    assert only.efficiency == pytest.approx(record.summary["efficiency"], abs=1e-4)
    assert only.flops == pytest.approx(record.summary["efficiency"] * record.summary["peak_tflops"] * 1e12, rel=1e-2)
    assert 0 < only.efficiency <= 1
    assert len(record.samples["layers/1/ms"]) == 3


def test_without_a_network_the_lines_are_said_to_be_missing(tmp_path: Path) -> None:
    made = job.make(compose.compose([*SMALL, f"results={tmp_path}"]))
    record = runner.run(made)
    assert record.status == "ok", record.error
    assert "up_mbit" in record.notes["lines"]
    with pytest.raises(ValueError, match="provider this: up_mbit: missing"):
        fleet_file.read(Path(made.out) / record.files["provider"])
