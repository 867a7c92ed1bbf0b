"""Claims about the comparison of a pruned sweep with the exhaustive one: what counts as best, and what is compared."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

from llmsys.job import Record

sys.path.insert(0, str(Path(__file__).parents[1] / "benchmarks"))


def record(length: int, batch: int, tokens: float, memory: float, status: str = "ok") -> Record:
    config = {"train": {"length": length, "micro_batch": batch, "recompute": "none"}}
    summary = {"tokens_per_s": tokens, "accounted_bytes": memory} if status == "ok" else {}
    return Record(name="", run_id="", task="train", status=status, config=config, summary=summary)


def test_the_front_holds_what_nothing_beats_both_ways() -> None:
    import bench_prune

    fast, large, small, beaten = (8, 4, 100, 40), (8, 8, 90, 80), (8, 1, 50, 10), (8, 2, 40, 50)
    longer = (16, 1, 10, 90)
    found = bench_prune.front([record(*cell) for cell in (fast, large, small, beaten, longer)])
    assert found == {(8, 4, "none"), (8, 8, "none"), (8, 1, "none"), (16, 1, "none")}, "lengths are not compared"


def test_what_the_pruned_sweep_did_not_run_is_missed_and_counted() -> None:
    import bench_prune

    cells = [(8, 4, 100, 40), (8, 8, 90, 80)]
    every = [*(record(*cell) for cell in cells), record(8, 16, 0, 0, "oom"), record(8, 32, 0, 0, "oom")]
    same = [*every[:3], record(8, 32, 0, 0, "skipped")]
    seconds = {"exhaustive": 40.0, "pruned": 10.0}
    found = bench_prune.compare(every, same, seconds)
    assert (found["time_percent"], found["runs_exhaustive"], found["runs_pruned"]) == (25.0, 4, 3)
    assert (found["front"], found["front_kept"], found["fit_in_one_only"]) == (2, 2, 0)
    too_much = [every[0], record(8, 8, 0, 0, "skipped"), *same[2:]]
    found = bench_prune.compare(every, too_much, seconds)
    assert (found["front_kept"], found["fit_in_one_only"]) == (1, 1)


@pytest.mark.slow
def test_both_sweeps_really_run_and_run_out_of_memory(tmp_path: Path) -> None:
    import bench_prune

    tiny = ("model.num_layers=1", "model.hidden_size=64", "model.num_heads=4", "model.num_kv_heads=4")
    sizes = ("--batches", "1,2048,4096", "--lengths", "128", "--recompute", "none", "--memory-gib", "0.7")
    found = bench_prune.main([*sizes, "--out", str(tmp_path), *tiny, "data.num_examples=2600"])
    assert (found.summary["cells"], found.summary["fit"], found.summary["fit_in_one_only"]) == (3, 1, 0)
    assert (found.summary["runs_exhaustive"], found.summary["runs_pruned"]) == (3, 2)
    assert found.summary["front_kept"] == found.summary["front"] == 1
