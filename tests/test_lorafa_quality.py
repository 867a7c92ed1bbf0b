"""The comparison of methods: its arithmetic on known numbers, and the whole of it at a size that learns nothing."""

from __future__ import annotations

import dataclasses
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from llmsys import job

BENCHMARKS = Path(__file__).parents[1] / "benchmarks"
sys.path.insert(0, str(BENCHMARKS))
SMALL = ["train.steps=2", "train.global_batch=2", "train.micro_batch=2", "train.length=32", "profile.warmup=0"]
TINY = ["model=llama_tiny", "data=code_docstrings", *SMALL, "data.max_train=20", "data.max_val=4"]


def test_the_bound_is_the_textbook_s() -> None:
    """Student's data of 1908, extra hours of sleep of ten patients under two drugs: mean -1.58, sd 1.23, n 10."""
    import paired

    first = dict(enumerate([0.7, -1.6, -0.2, -1.2, -0.1, 3.4, 3.7, 0.8, 0.0, 2.0]))
    second = dict(enumerate([1.9, 0.8, 1.1, 0.1, -0.1, 4.4, 5.5, 1.6, 4.6, 3.4]))
    found = paired.difference(first, second, higher=True)
    assert found is not None
    assert found.pairs == 10
    assert found.mean == pytest.approx(-1.58)
    assert found.bound == pytest.approx(-1.58 - 1.3830 * 1.2300 / 10**0.5, abs=1e-3)
    other = paired.difference(first, second, higher=False)
    assert other is not None
    assert other.bound == pytest.approx(2 * found.mean - found.bound)  # the bad side of a loss is the other one
    assert paired.difference(first, {3: -1.2, 99: 5.0}, higher=True) == paired.Difference(0.0, None, 1)
    assert paired.difference(first, {}, higher=True) is None


@pytest.mark.parametrize(("bound", "higher", "good"), [(-0.9, True, True), (-1.1, True, False), (0.9, False, True)])
def test_a_verdict_is_about_the_bound_and_not_the_mean(bound: float, higher: bool, good: bool) -> None:
    import paired

    assert paired.within(paired.Difference(0.0, bound, 5), 1.0, higher=higher) is good
    assert paired.within(paired.Difference(5.0, None, 1), 1.0, higher=higher) is None


@pytest.mark.parametrize("summit", range(9))
@pytest.mark.parametrize("start", [0, 4, 8])
def test_the_search_finds_the_best_rate_from_anywhere(summit: int, start: int) -> None:
    import paired

    found: dict[int, float] = {}
    while new := paired.to_try(9, start, found):
        found |= {i: -abs(i - summit) for i in new}
    assert paired.summit(found) == summit
    assert {max(summit - 1, 0), min(summit + 1, 8)} <= found.keys()
    assert len(found) <= abs(summit - start) + 3


def test_a_rate_that_diverged_is_the_worst() -> None:
    import math

    import paired

    assert paired.to_try(9, 4, {3: 1.0, 4: -math.inf, 5: -math.inf}) == [2]
    assert paired.to_try(9, 4, {3: -math.inf, 4: -math.inf, 5: -math.inf}) == []
    assert paired.summit({3: -math.inf}) is None


def test_ranks_are_chosen_by_size() -> None:
    import paired

    sizes = {r: 10.0 * r for r in range(1, 9)}
    assert paired.nearest(sizes, 34) == 3
    assert paired.nearest(sizes, 35) == 3
    assert paired.largest_within(sizes, 50) == 5
    assert paired.largest_within(sizes, 9) is None


@pytest.fixture
def tiny(monkeypatch: pytest.MonkeyPatch) -> None:
    """A family that learns nothing, in place of the three."""
    import lorafa_quality
    import quality_contestants

    causal = lorafa_quality.FAMILIES["causal"]
    family = dataclasses.replace(
        causal, overrides=("+exp=lorafa_llama_6m", *quality_contestants.WHOLE, *TINY), base=None
    )
    monkeypatch.setattr(lorafa_quality, "FAMILIES", {"encoder": family})
    monkeypatch.setattr(lorafa_quality, "GRID", (5e-4, 2e-3, 5e-3))
    monkeypatch.setattr(quality_contestants, "WIDER", 4)


@pytest.mark.slow
@pytest.mark.usefixtures("tiny")
def test_the_whole_comparison(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    import comparison
    import fresh_runs
    import lorafa_quality
    import quality_table

    arguments = ["--results", str(tmp_path), "--families", "encoder", "--override", "model.weights=random"]
    made: list[int] = []

    def make(wanted: list[fresh_runs.Words]) -> None:
        made.append(sum(fresh_runs.finished(words) is None for words in wanted))
        fresh_runs.inline(wanted)

    record = lorafa_quality.main([*arguments, "--seeds", "2"], make)
    printed = capsys.readouterr().out
    assert printed.strip() == quality_table.table(record)
    assert list(quality_table.lines(record, "causal")) == ["full", "lora", "lorafa_rank", "lorafa_memory"]
    for name, line in quality_table.lines(record, "causal").items():
        assert set(line.by_seed) == {0, 1}, name
        assert line.numbers["settled"]
        assert line.by_rate[line.numbers["lr"]] == min(v for v in line.by_rate.values() if v is not None)
    lora, memory = (quality_table.lines(record, "causal")[name].numbers for name in ("lora", "lorafa_memory"))
    assert memory["r"] > lora["r"]
    assert memory["accounted_bytes"] <= lora["accounted_bytes"]
    assert "| lorafa_rank, r=8 |" in printed
    assert sum(made) > 16

    made.clear()
    again = lorafa_quality.main([*arguments, "--seeds", "2"], make)
    assert sum(made) == 0
    assert again == dataclasses.replace(record, env=again.env)
    kept = tmp_path / "kept"
    asked = lorafa_quality.arguments(arguments)
    runs = lorafa_quality.Comparison(lorafa_quality.FAMILIES["encoder"], asked).records()
    comparison.keep([record, *runs], kept)
    assert str(tmp_path) not in "".join(path.read_text() for path in kept.rglob("record.json"))
    assert len(list(kept.rglob("record.json"))) > 8


@pytest.mark.slow
def test_runs_are_fresh_processes_side_by_side_and_a_bad_one_is_named(tmp_path: Path) -> None:
    import fresh_runs

    model = ["model.num_layers=1", *SMALL, "data.num_examples=20", f"results={tmp_path}"]
    good = [(*model, f"train.seed={seed}") for seed in (0, 1)]
    bad = (*model, "train.lr_by_method.full=1e30")  # diverges, which is a result
    runs = fresh_runs.Runs(2)
    runs([*good, good[0], bad])
    assert runs.progress.made == 3
    records = [fresh_runs.finished(words) for words in (*good, bad)]
    assert [(r.status, r.reason) for r in records if r] == [("ok", ""), ("ok", ""), ("failed", "nan")]
    assert len({r.env["variables"]["OMP_NUM_THREADS"] for r in records if r}) == 1
    with pytest.raises(RuntimeError, match=r"hardware\.mem_gib=0\.0001"):
        runs([(*model, "hardware.mem_gib=0.0001")])


@pytest.mark.slow
def test_ctrl_c_stops_the_runs_and_says_so(tmp_path: Path) -> None:
    """SIGTERM, as a scheduler sends it; from a shell's background, where SIGINT is ignored."""
    long = ["data=synthetic", "model=llama_tiny", "train.steps=100000", f"results={tmp_path}"]
    code = f"import fresh_runs; fresh_runs.Runs(2)([({long}[0], *{long}[1:], f'train.seed={{s}}') for s in (0, 1, 2)])"
    env = {**os.environ, "PYTHONPATH": f"{BENCHMARKS}:{os.environ.get('PYTHONPATH', '')}"}
    script = subprocess.Popen([sys.executable, "-c", code], env=env, stderr=subprocess.PIPE)
    while len(list(tmp_path.rglob("metrics.jsonl"))) < 2:
        assert script.poll() is None
    script.send_signal(signal.SIGTERM)
    _, told = script.communicate(timeout=60)
    assert script.returncode != 0
    assert b"KeyboardInterrupt" in told
    records = [job.Record.read(path.parent) for path in tmp_path.rglob("record.json")]
    assert [r.status for r in records if r] == ["interrupted", "interrupted"]
