"""Claims about the two benchmarks of advice: what is regretted, what counts, and that they run."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parents[1] / "benchmarks"))


def test_regret_is_against_the_fastest_that_fits() -> None:
    from bench_advice import Measured, regret, scored

    cells = {
        ("Naive", 8): Measured(100, 1000),
        ("F", 8): Measured(120, 700),
        ("F+R", 8): Measured(90, 300),
        ("F", 1): Measured(60, 200),
    }
    assert regret(cells, 1000, ("F", 8))["regret_percent"] == 0
    assert regret(cells, 1000, ("Naive", 8))["regret_percent"] == pytest.approx(100 * (1 - 100 / 120))
    found = regret(cells, 500, ("F", 1))
    assert (found["regret_percent"], found["cells_that_fit"]) == (pytest.approx(100 / 3), 2)
    found = regret(cells, 500, ("F", 8))
    assert (found["fits"], found["regret_percent"]) == (0, 100), "what runs out of memory is worth nothing"
    assert regret(cells, 100, None)["regret_percent"] == 0, "nothing fits, and that was said"
    assert regret(cells, 500, None)["regret_percent"] == 100
    with pytest.raises(ValueError, match="R at micro-batch 8: was chosen, and is no cell"):
        regret(cells, 500, ("R", 8))
    summary, notes = scored(cells, {30: ("F", 1), 70: ("F", 8)}, {30: 300, 70: 700})
    assert summary["worst_regret_percent"] == pytest.approx(100 / 3)
    assert notes == {"30/choice": "F, 1", "30/best": "F+R, 8", "70/choice": "F, 8", "70/best": "F, 8"}


def test_a_change_is_scored_where_what_it_saves_is_known_well_enough() -> None:
    from bench_opportunities import known_to, scores

    rows = [
        {"saved_ms": 10.0, "least_ms": 9.0, "most_ms": 11.0, "saves_ms": 9.0},
        {"saved_ms": -2.0, "least_ms": -2.2, "most_ms": -1.9, "saves_ms": -2.4},
        {"saved_ms": 10.0, "least_ms": 5.0, "most_ms": 11.0, "saves_ms": 10.0},
        {"saved_ms": 0.0, "least_ms": -0.1, "most_ms": 0.1, "saves_ms": 0.5},
    ]
    assert [known_to(row) for row in rows] == pytest.approx([10, 10, 50, float("inf")])
    found = scores(rows)
    assert (found["changes"], found["changes_that_can_be_told"], found["within_bound"]) == (4, 2, 1)
    assert (found["mean_off_percent"], found["worst_off_percent"]) == pytest.approx((15, 20))
    assert scores(rows[2:]) == {"changes": 2, "changes_that_can_be_told": 0}


TINY = ["model=llama_tiny", "train.length=32", "train.threads=1", "data.num_examples=24"]


@pytest.mark.slow
def test_advice_is_asked_of_a_sweep_that_really_runs(tmp_path: Path) -> None:
    import bench_advice

    sizes = ["--ranks", "1", "--batches", "1,2", "--letters", "F,R", "--inline", "--out", str(tmp_path)]
    quick = ["--calibration", "task.most_s=0.004", "task.steps=2", "--"]
    found = bench_advice.main([*sizes, *quick, *TINY, "train.steps=3", "profile.warmup=1"])
    assert found.summary["cells"] == len(found.samples["peak_bytes"]) == 8
    assert all(found.summary[f"{cap}/best_tokens_per_s"] >= 0 for cap in bench_advice.CAPS)
    assert "Worst regret" in bench_advice.show(found)


@pytest.mark.slow
def test_changes_are_made_and_compared(tmp_path: Path) -> None:
    import bench_opportunities

    sizes = ["--rounds", "2", "--cases", "4 x 512", "--inline", "--out", str(tmp_path)]
    small = ["train.micro_batch=2", "train.global_batch=2", "task.warmup=1"]
    found = bench_opportunities.main([*sizes, *TINY, *small])
    assert found.summary["changes"] == 3
    assert "| 4 x 512 | flash |" in bench_opportunities.show(found)
