"""Claims about the course of a sweep: what runs, what does not and why, and what a second start repeats.

No process is started here: what a run would come to is a function (`sweep_harness.Machine`). Records are real.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from sweep_harness import Course, Machine, configs, course, statuses, written

from llmsys.sweep import report
from llmsys.sweep.settings import Config


def limited(tokens: int) -> Any:
    """Runs of so many tokens in a micro-batch run out of memory."""
    return lambda config: ("oom", "host memory") if _tokens(config) > tokens else ("ok", "")


def _tokens(config: Config) -> int:
    return int(config["train"]["micro_batch"] * config["train"]["length"])


def test_a_pruned_sweep_runs_every_cell_that_fits_and_records_the_others_with_a_witness(
    results: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    machine = Machine(monkeypatch, limited(64))
    axes: dict[str, Any] = {"train__length": [8, 16, 32], "train__micro_batch": [1, 2, 4, 8]}
    made = course(configs(results, "sweep.order=predicted", "sweep.prune=true", **axes))
    ended = {(job.config["train"]["length"], job.config["train"]["micro_batch"]): r for job, r in made.run()}
    assert len(ended) == 12
    assert {cell for cell, record in ended.items() if record.status == "ok"} == {
        (length, batch) for length, batch in ended if length * batch <= 64
    }
    ran_out = {cell: record.run_id for cell, record in ended.items() if record.status == "oom"}
    assert set(ran_out) == {(16, 8), (32, 4)}, "those that cover no other that ran out"
    record = ended[32, 8]
    assert (record.status, record.reason) == ("skipped", "witness")
    assert any(witness in record.error for witness in ran_out.values())
    assert len(machine.made) == 11
    assert len(written(results)) == 12, "what was not run has a record too"


def test_what_an_earlier_sweep_saw_is_a_witness_in_the_next(results: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    machine = Machine(monkeypatch, limited(16))
    list(course(configs(results, "sweep.prune=true", train__micro_batch=[4])).run())
    later = course(configs(results, "sweep.prune=true", train__micro_batch=[8]))
    later_length = course(configs(results, "sweep.prune=true", "train.length=8", train__micro_batch=[1]))
    assert statuses(later, "train.micro_batch") == [(8, "skipped", "witness")]
    assert statuses(later_length, "train.micro_batch") == [(1, "ok", "")]
    assert len(machine.made) == 2


def test_without_prune_everything_runs_in_the_order_listed(results: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    Machine(monkeypatch, limited(16))
    made = course(configs(results, train__micro_batch=[8, 1, 4]))
    assert [batch for batch, *_ in statuses(made, "train.micro_batch")] == [8, 1, 4]


def test_a_combination_that_cannot_be_is_unsupported_and_the_others_run(
    results: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    machine = Machine(monkeypatch)
    combinations = configs(results, "method=lorafa", train__length=[32, 100000], train__fp8=[False, True])
    made = course(combinations)
    ended = [record for _, record in made.run()]
    assert sorted((r.status, r.reason) for r in ended) == [("ok", ""), *[("unsupported", "contradiction")] * 3]
    assert any("train.fp8=true" in r.error for r in ended)
    assert any("train.length=100000" in r.error for r in ended)
    assert len(machine.made) == 1
    before = written(results)
    list(course(combinations).run())
    assert written(results) == before, "said once more, nothing is written"


def test_a_mistake_stops_everything_before_anything_starts(results: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A wrong value in one cell, a contradiction in all cells, and a sweep that does not know its own settings."""
    machine = Machine(monkeypatch)
    with pytest.raises(ValueError, match=r"train\.schedule=cosin"):
        course(configs(results, train__schedule=["cosine", "cosin"]))
    with pytest.raises(ValueError, match=r"train\.length=100000"):
        course(configs(results, train__length=[100000, 200000]))
    with pytest.raises(ValueError, match=r"sweep\.repeats=2"):
        course(configs(results, sweep__repeats=[1, 2]))
    with pytest.raises(ValueError, match=r"sweep\.monotone=train\.stpes"):
        course(configs(results, "sweep.monotone=[train.stpes]"))
    assert not machine.made
    assert not results.exists()


def test_repeats_are_runs_of_their_own_in_rounds_and_the_first_keeps_its_id(
    results: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    Machine(monkeypatch)
    plain = [record.run_id for _, record in course(configs(results, train__seed=[0, 1])).run()]
    made = course(configs(results, "sweep.repeats=3", train__seed=[0, 1]))
    ended = list(made.run())
    assert [(j.config["train"]["seed"], j.config["repeat"]) for j, _ in ended] == [
        (seed, repeat) for repeat in range(3) for seed in range(2)
    ]
    assert [record.run_id for _, record in ended][:2] == plain
    assert len({record.run_id for _, record in ended}) == 6
    assert ended[5][0].config["command"][-1] == "repeat=2"
    ((title, headers, lines),) = report.tables(made)
    assert title == "Over repeats"
    assert [line[headers.index("repeats")] for line in lines] == ["3", "3"]


def test_scaling_efficiency_is_shown_with_its_interval(results: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Two ranks are as fast together as one: half each. Of one round there is no interval."""
    Machine(monkeypatch)
    for repeats, interval in ((1, "–"), (3, "0.0")):
        words = ("engine=ddp", "train.micro_batch=4", f"sweep.repeats={repeats}")
        made = course(configs(results, *words, train__world=[1, 2]))
        list(made.run())
        *_, (title, headers, lines) = report.tables(made)
        assert title.startswith("Scaling efficiency")
        shown = [[line[headers.index(key)] for key in ("efficiency %", "± % (95 %)", "rounds")] for line in lines]
        assert shown == [["100.0", interval, str(repeats)], ["50.0", interval, str(repeats)]]


def test_a_repeat_of_what_ran_out_of_memory_is_pruned(results: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    machine = Machine(monkeypatch, limited(0))
    made = course(configs(results, "sweep.repeats=3", "sweep.prune=true"))
    assert [status for _, status, _ in statuses(made, "train.seed")] == ["oom", "skipped", "skipped"]
    assert len(machine.made) == 1


def test_a_reference_cell_between_the_others_reveals_drift(results: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Ten minutes in, every step takes half as long again."""
    machine = Machine(monkeypatch)
    machine.step_ms = lambda n: 150.0 if n > 6 else 100.0
    made = course(configs(results, "sweep.reference_every=2", train__seed=range(7)))
    order = [(j.config["train"]["seed"], j.config["repeat"]) for j, _ in made.run()]
    assert order == [(0, 0), (1, 0), (0, 1), (2, 0), (3, 0), (0, 2), (4, 0), (5, 0), (0, 3), (6, 0), (0, 4)]
    found = report.course_drift(made)
    assert found is not None
    assert (found.measured, found.median_ms) == (5, 100.0)
    flagged = {made.records[run][0].config["train"]["seed"] for run in found.off}
    assert flagged == {4, 5, 6}, "measured between a reference that was as always and one that was not, or after"
    assert "drift" in report.lines(made)[0]


def test_a_second_start_repeats_nothing_and_goes_on_where_the_first_was_stopped(
    results: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    machine = Machine(monkeypatch, lambda config: ("oom" if config["train"]["seed"] == 1 else "ok", ""))
    machine.stop_after = 4
    wanted = configs(results, "sweep.repeats=2", "sweep.reference_every=3", train__seed=range(3))
    first: list[str] = []
    with pytest.raises(KeyboardInterrupt):
        first += [record.run_id for _, record in _collect(course(wanted), first)]
    assert len(machine.made) == 5
    machine.stop_after = None
    ended = [record for _, record in course(wanted).run()]
    assert len(machine.made) == 5 + 1 + len(ended) - 5, "the one that was stopped, and those that were to come"
    assert {record.status for record in ended} == {"ok", "oom"}
    made = len(machine.made)
    third = course(wanted)
    list(third.run())
    assert len(machine.made) == made, "a third start has nothing to do, references included"
    found = report.course_drift(third)
    assert found is not None
    assert found.measured == 2 + 2, "of earlier sessions: its two repeats, and those between"


def _collect(made: Course, ids: list[str]) -> Any:
    for job, record in made.run():
        ids.append(record.run_id)
        yield job, record


def test_a_search_finds_the_limit_of_each_combination_and_why(results: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    machine = Machine(monkeypatch, limited(1000))
    settings = ("sweep.search=max", "sweep.search_limit=64")
    wanted = configs(results, *settings, train__length=[16, 100])
    made = course(wanted)
    list(made.run())
    assert [(f.largest, f.smallest, f.why) for f in made.found] == [
        (62, 63, "oom (host memory)"),
        (10, 11, "oom (host memory)"),
    ]
    for config in machine.made:
        assert config["train"]["global_batch"] == config["train"]["micro_batch"]
    runs = len(machine.made)
    assert runs <= 20
    again = course(wanted)
    list(again.run())
    assert [f.largest for f in again.found] == [62, 10]
    assert len(machine.made) == runs
    ((_, headers, lines),) = report.tables(made)
    assert [line[headers.index("train.length")] for line in lines] == ["16", "100"]
    assert [line[headers.index("largest")] for line in lines] == ["62", "10"]
    assert all(line[headers.index("tokens/s")] != "–" for line in lines)


@pytest.mark.parametrize(("steps", "verified"), [(0, False), (3, True), (10, True)])
def test_the_speed_of_what_was_not_verified_is_not_shown(
    results: Path, monkeypatch: pytest.MonkeyPatch, steps: int, verified: bool
) -> None:
    """Runs have 3 steps: a search that wants no more has verified them already."""
    machine = Machine(monkeypatch, limited(64))
    settings = ("sweep.search=max", "sweep.search_limit=8", f"sweep.verify_steps={steps}")
    made = course(configs(results, *settings, train__length=[16]))
    list(made.run())
    assert {config["train"]["steps"] for config in machine.made} == ({3, 10} if steps == 10 else {3})
    ((_, headers, lines),) = report.tables(made)
    assert [line[headers.index("tokens/s")] != "–" for line in lines] == [verified]


def test_what_is_found_is_verified_with_more_steps(results: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """32 and more fit for 3 steps and not for 10, as memory that fragments does."""

    def ends(config: Config) -> tuple[str, str]:
        few = config["train"]["steps"] < 10
        return ("ok", "") if config["train"]["micro_batch"] < (40 if few else 32) else ("oom", "host memory")

    Machine(monkeypatch, ends)
    made = course(configs(results, "sweep.search=max", "sweep.search_limit=64", "sweep.verify_steps=10"))
    list(made.run())
    assert [(f.largest, f.smallest) for f in made.found] == [(31, 32)]
    assert made.found[0].record is not None
    assert made.found[0].record.config["train"]["steps"] == 10


def test_a_search_ends_where_a_run_fails_for_another_reason(results: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A crash says nothing of memory: to call it a limit would be wrong."""
    machine = Machine(monkeypatch, lambda config: ("crashed", "signal"))
    made = course(configs(results, "sweep.search=max"))
    list(made.run())
    assert len(machine.made) == 1
    assert [(f.largest, f.why) for f in made.found] == [(0, "crashed (signal)")]


def test_a_search_that_nothing_stops_says_so(results: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    Machine(monkeypatch)
    made = course(configs(results, "sweep.search=max", "sweep.search_limit=16"))
    list(made.run())
    assert [(f.largest, f.smallest, f.why) for f in made.found] == [(16, None, "")]
