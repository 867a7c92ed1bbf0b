"""Claims about cells: what is one, what is compared with what, and what of it is chosen."""

from __future__ import annotations

import dataclasses
import itertools
import math
import random

import pytest
from report_harness import GIB, calibration, cell, on_gpu

from llmsys import schema
from llmsys.bench import cells, workloads
from llmsys.bench.predict import machine as machines
from llmsys.bench.predict.prediction import predict
from llmsys.bench.report import ablation, choice, costs, front, paper, predictions, quality
from llmsys.bench.report.predictions import Guess
from llmsys.cost import case as cases
from llmsys.cost import memory
from llmsys.job import Record
from llmsys.spread import student


def only(records: list[Record]) -> workloads.Workload:
    (workload,) = workloads.workloads(records)
    return workload


def test_repeats_are_one_cell_and_another_length_is_another_workload() -> None:
    records = [cell("F", 1000 + 10 * i, repeat=i) for i in range(5)]
    records += [cell("F", keys={"train.length": 64}), cell("F+R")]
    one, other = workloads.workloads(records)
    assert [(each.label, len(each.records)) for each in one.cells] == [("F", 5), ("F+R", 1)]
    assert [each.label for each in other.cells] == ["F"]
    assert "length 64" in other.title
    tokens = one.cells[0].tokens
    assert tokens is not None
    assert (tokens.mean, tokens.half) == (1020.0, pytest.approx(student(4) * 15.811388 / 5**0.5))


def test_another_seed_or_learning_rate_is_a_repeat() -> None:
    """They change no step's time or memory, and the luckiest seed is no choice."""
    records = [cell("F", 1000), cell("F", 1010, keys={"train.seed": 7}), cell("F", 1020, keys={"train.lr_scale": 2.0})]
    assert [(each.label, len(each.records)) for each in only(records).cells] == [("F", 3)]


def test_what_letters_do_not_tell_apart_stands_beside_them() -> None:
    fsdp2 = {"engine": {"kind": "fsdp2"}}
    workload = only([cell("F+Z3"), cell("F+Z3", keys=fsdp2), cell("F", keys={"train.loss": "whole"})])
    assert [each.label for each in workload.cells] == ["F+Z3", "F+Z3 (fsdp2)", "F"]


def test_other_kernels_are_another_workload() -> None:
    """A mean over deterministic kernels and others would be of neither."""
    records = [cell("F", 1000), cell("F", 2000, keys={"train.deterministic": False})]
    found = workloads.workloads(records)
    assert [[len(each.records) for each in workload.cells] for workload in found] == [[1], [1]]
    assert {workload.title.rpartition(" · ")[2] for workload in found} == {"deterministic True", "deterministic False"}


def test_cells_under_a_limit_say_so() -> None:
    limited = cell("F", keys={"dispatch.memory_gib": 0.9})
    assert [each.label for each in only([cell("F"), limited]).cells] == ["F", "F (under 0.9 GiB)"]


def test_a_killed_run_which_left_no_word_of_its_device_stays_with_its_workload() -> None:
    killed = cell("R", status="crashed", reason="unfinished")
    killed.env = {}
    workload = only([cell("F"), killed])
    assert [each.unfinished for each in workload.cells] == [False, True]


def test_settings_of_another_version_keep_their_cell() -> None:
    old = cell("F")
    old.config["train"]["gone"] = 1
    labels = sorted(each.label for workload in workloads.workloads([old, cell("F")]) for each in workload.cells)
    assert labels == ["F", "ddp, full"]


def test_settings_that_came_later_are_at_their_defaults_though_the_rest_would_be_refused() -> None:
    old = cell("F", keys={"train.schedule": "gone"})
    assert "head_dim" not in old.config["model"], "of a published record from before there was one"
    assert len(only([old, cell("F")]).cells) == 2


def test_memory_is_the_allocators_peak_on_a_gpu() -> None:
    (found,) = only([on_gpu(cell("F"), peak_gib=3.0)]).cells
    assert found.memory is not None
    assert found.memory.mean == 3 * GIB
    assert found.card == "a800"


def test_pairs_are_not_misled_by_what_is_missing() -> None:
    """F is worth 20 % in each context. Naive cells that are slow for another reason (R) have no partner, so a mean over
    all cells with F against all without would say 80 %."""
    records = [cell("Z2", 1000), cell("F+Z2", 1200), cell("Z3", 800), cell("F+Z3", 960)]
    records += [cell("R", 300), cell("R+Z2", 280), cell("F+R", status="oom", reason="host memory")]
    effects = {each.letter: each for each in ablation.effects(only(records), lambda each: each.tokens)}
    assert effects["F"].mean.percent == pytest.approx(20)
    assert (effects["F"].mean.low, effects["F"].mean.high) == (pytest.approx(20), pytest.approx(20))
    assert [pair.context for pair in effects["F"].pairs] == ["Z2", "Z3"]
    assert len(effects["R"].pairs) == 1  # R+Z2 over Z2; of R alone there is no Naive


def test_the_interval_is_students_over_the_pairs() -> None:
    records = [cell("Naive", 1000), cell("F", 1100), cell("Z2", 1000), cell("F+Z2", 1200)]
    (found,) = [each for each in ablation.effects(only(records), lambda e: e.tokens) if each.letter == "F"]
    logs = [math.log(1.1), math.log(1.2)]
    mean, sd = sum(logs) / 2, abs(logs[0] - logs[1]) / 2**0.5
    assert found.mean.percent == pytest.approx(100 * math.expm1(mean))
    assert found.mean.low == pytest.approx(100 * math.expm1(mean - student(1) * sd / 2**0.5))


def test_a_stage_is_not_dropped_with_the_offload_that_needs_it() -> None:
    records = [cell("Naive", 1000), cell("Z3", 900), cell("Z3+O", 500)]
    effects = {each.letter: each for each in ablation.effects(only(records), lambda e: e.tokens)}
    assert [pair.on.label for pair in effects["Z3"].pairs] == ["Z3"]
    assert [pair.on.label for pair in effects["O"].pairs] == ["Z3+O"]


def test_cells_of_another_batch_or_number_of_ranks_are_no_pair() -> None:
    records = [cell("Naive"), cell("F", batch=8), cell("R", world=4)]
    assert ablation.effects(only(records), lambda e: e.tokens) == []


def test_nothing_beats_a_cell_on_the_front_and_everything_else_is_beaten() -> None:
    rng = random.Random(0)
    letters = ["".join(each) for n in range(3) for each in itertools.combinations(("F+", "R+", "O8+"), n)]
    names = [f"{prefix}{zero}".strip("+") for prefix in letters for zero in ("Z1", "Z2", "Z3")]
    workload = only([cell(name, rng.randrange(5, 15) * 100, rng.randrange(5, 15) / 10) for name in names])
    best = front.front(workload.measured)

    def place(one: cells.Cell) -> tuple[float, float]:
        assert one.tokens is not None
        assert one.memory is not None
        return one.tokens.mean, -one.memory.mean

    def beats(one: cells.Cell, other: cells.Cell) -> bool:
        (a, b), (c, d) = place(one), place(other)
        return a >= c and b >= d and (a, b) != (c, d)

    for each in workload.measured:
        beaten = any(beats(other, each) for other in workload.measured)
        assert beaten != (place(each) in map(place, best))


def test_a_frozen_base_is_chosen_for_nothing() -> None:
    """It is fastest and smallest, and trains no linear weight."""
    workload = only([cell("Q", 9000, 0.1), cell("F", 1000, 1.0), cell("Z3", 800, 0.5)])
    found = {each.goal.name: each.best.label for each in choice.choices(workload)}
    assert found == {"throughput": "F", "fit": "Z3"}
    assert "Q" not in [each.label for each in front.front(workload.measured)]
    assert choice.choices(only([cell("F+Q"), cell("Q+Z2")]))[0].best.label in (
        "F+Q",
        "Z2+Q",
    )  # nothing else was measured


def test_a_margin_within_the_noise_says_so_and_one_beyond_does_not() -> None:
    close = [cell("F", tokens, repeat=i) for i, tokens in enumerate((980, 1000, 1020))]
    close += [cell("R", tokens, repeat=i) for i, tokens in enumerate((970, 990, 1010))]
    (found, *_) = choice.choices(only(close))
    assert found.margin is not None
    assert not found.margin.certain
    far = [*close[:3], *(cell("R", tokens, repeat=i) for i, tokens in enumerate((490, 500, 510)))]
    (found, *_) = choice.choices(only(far))
    assert found.margin is not None
    assert found.margin.certain
    assert found.margin.low is not None
    assert found.margin.low < 100 == pytest.approx(found.margin.percent)
    (once, *_) = choice.choices(only([close[0], close[3]]))
    assert once.margin is not None
    assert once.margin.low is None, "of a single run nobody knows"


def test_dropping_a_letter_is_looked_up_not_guessed() -> None:
    workload = only([cell("F+R+Z3", 1000, 0.5), cell("R+Z3", 500, 0.6), cell("F+R", 900, 0.9)])
    (best, *_) = choice.choices(workload)
    assert {drop.letter: drop.speed.percent for drop in best.dropped if drop.speed} == {
        "F": pytest.approx(-50),
        "Z3": pytest.approx(-10),
    }


def test_cost_is_rent_over_tokens() -> None:
    (found, _) = only(
        [on_gpu(cell("F", 3600, world=2), "NVIDIA H200"), on_gpu(cell("R", 1, world=2), "NVIDIA H200")]
    ).cells
    usd = choice.usd_per_million(found)
    assert usd is not None
    assert usd.mean == pytest.approx(3.59 * 2 / 3600 / 3600 * 1e6)
    assert choice.usd_per_million(only([cell("F")]).cells[0]) is None, "of a CPU no price is known"


def test_the_paper_s_order_and_its_oom_cells() -> None:
    names = ["Z3+O", "F", "Naive", "Z2", "Z3", "R+Z2", "Z2+O", "F+R", "R"]
    records = [cell(name) for name in names] + [cell("F+Z3", status="oom", reason="device memory")]
    (grid,) = paper.grids([only(records)])
    rows = ["Naive", "F", "R", "F+R", "Z2", "R+Z2", "Z2+O", "Z3", "F+Z3", "Z3+O"]
    assert [label for label, _ in grid.rows] == rows
    assert grid.columns == (("llama_6m", 4),)
    assert [found.ending for label, (found,) in grid.rows if found and label == "F+Z3"] == ["oom (device memory)"]


def test_adapters_have_a_table_of_their_own() -> None:
    grids = paper.grids([only([cell("L"), cell("QL"), cell("F"), cell("R")])])
    assert [[label for label, _ in grid.rows] for grid in grids] == [["L", "QL"], ["F", "R"]]


def test_the_largest_batch_that_ran_lies_below_the_smallest_that_did_not() -> None:
    records = [cell("F", batch=batch) for batch in (1, 2, 4, 16)]
    records += [cell("F", batch=batch, status="oom", reason="host memory") for batch in (8, 32)]
    records += [cell("R", batch=batch, status="oom", reason="host memory") for batch in (1, 2)]
    found = {each.name: each for each in paper.limits(only(records))}
    assert found["F"].ran is not None
    assert (found["F"].ran.batch, found["F"].failed and found["F"].failed.batch) == (4, 8)
    assert found["R"].ran is None


def test_kendalls_tau_is_the_correlation_of_signs() -> None:
    """Kendall's tau-b as its definition by signs of differences over all ordered pairs, ties included."""

    def sign(value: float) -> int:
        return (value > 0) - (value < 0)

    rng = random.Random(1)
    for count in (2, 5, 30):
        pairs = [(float(rng.randrange(8)), float(rng.randrange(8))) for _ in range(count)]
        signs = [(sign(a - c), sign(b - d)) for a, b in pairs for c, d in pairs]
        norm = math.sqrt(sum(x * x for x, _ in signs) * sum(y * y for _, y in signs))
        assert quality.kendall(pairs) == (pytest.approx(sum(x * y for x, y in signs) / norm) if norm else None)
    assert quality.kendall([(1.0, 2.0), (2.0, 3.0), (3.0, 1.0)]) == pytest.approx(-1 / 3)
    assert quality.kendall([(1.0, 2.0), (1.0, 3.0)]) is None


def test_errors_are_relative_to_what_was_measured() -> None:
    (one, two) = only([cell("F"), cell("R")]).cells
    guesses = [Guess(cell=one, predicted=1.1, measured=1.0), Guess(cell=two, predicted=1.8, measured=2.0)]
    found = quality.score(guesses)
    assert found == quality.Score(count=2, error=pytest.approx(10), bias=pytest.approx(0, abs=1e-9), tau=1.0)
    assert quality.score([]) is None


def test_a_perfect_prediction_of_memory_has_no_error() -> None:
    """On a CPU of what is accounted for, kind by kind the same; on a GPU of the peak. They are 10 % and more apart."""
    config = schema.build(cell("F").config)
    parts = (config.model, config.train, config.method, config.engine)
    kinds = sum(memory.estimate(*parts, **cases.facts(config, "cpu")).values())
    peak = memory.peak_bytes(*parts, **cases.facts(config, "cuda"))
    on_cpu = cell("F", memory_gib=kinds / GIB, predicted_peak_gib=7.0)
    (one,) = predictions.of(only([on_cpu])).memory
    assert one.error == pytest.approx(0)
    (one,) = predictions.of(only([on_gpu(cell("F"), peak_gib=peak / GIB, predicted_peak_gib=7.0)])).memory
    assert one.error == pytest.approx(0)
    assert abs(peak / kinds - 1) > 0.1


def test_time_is_predicted_by_a_calibration_of_the_same_device_ranks_and_precision() -> None:
    """And not by what a run says of itself before it begins, which is a lower bound."""
    records = [cell("F", predicted_step_ms=1.0), cell("R"), cell("F", world=1), calibration()]
    workload = only(records[:3])
    found = predictions.of(workload, records)
    config = schema.build(records[0].config)
    expected = predict(config, machines.calibrated(dataclasses.asdict(records[3]), config)).step_ms
    assert {one.cell.label: one.predicted for one in found.time}["F"] == pytest.approx(expected)
    assert {(one.cell.label, one.cell.world) for one in found.time} == {("F", 2), ("R", 2)}
    ((why, (alone,)),) = found.without_time.items()
    assert alone.world == 1
    assert "no calibration of" in why
    assert "with train.world=1 train.threads=" in why
    for other in (calibration(precision="bf16"), calibration(device="another CPU"), calibration(world=4)):
        assert not predictions.of(workload, [*records[:3], other]).time


def test_a_cell_that_a_calibration_was_made_of_is_not_scored_by_it() -> None:
    given = cell("F").config["train"]["length"]
    records = [cell("F"), cell("F", batch=1), cell("R")]
    for length, seen in ((given, {"F4"}), (4 * given, {"F1"})):
        found = predictions.of(only(records), [calibration(**{"train.length": length})])
        scored = {f"{one.cell.label}{one.cell.batch}" for one in found.time}
        assert scored == {"F4", "F1", "R4"} - seen
        assert "was made of this cell itself" in str(found.without_time)


def test_time_on_a_card_that_is_listed_is_predicted_by_its_datasheet() -> None:
    keys = {"train.precision": "bf16", "model.dtype": "bf16"}
    workload = only([on_gpu(cell("F", keys=keys), peak_gib=1.0)])
    (one,) = predictions.of(workload).time
    config = schema.build(workload.cells[0].record.config)
    there = dataclasses.replace(config, hardware=schema.Hardware(name="a800", devices=2))
    assert one.predicted == pytest.approx(predict(there).step_ms)
    slice_ = on_gpu(cell("F", keys=keys), peak_gib=1.0)
    slice_.env["device_memory_gib"] = 9.9
    assert only([slice_]).cells[0].card is None, "a slice of a card is another"
    assert not predictions.of(only([slice_])).time


def test_runs_of_other_code_are_no_repeats() -> None:
    """A mean over both would be of neither: the newest code's count, the others are named."""
    records = [cell("F", tokens, repeat=i) for i, tokens in enumerate((100, 1000, 1020))]
    for record, code, day in zip(records, ("old", "new", "new"), (1, 2, 3), strict=True):
        record.code_hash, record.started = code, f"2026-01-0{day}T00:00:00+00:00"
    (found,) = only(records).cells
    assert found.tokens is not None
    assert (found.tokens.mean, len(found.records)) == (1010.0, 2)
    assert [each.run_id for each in found.older] == [records[0].run_id]
    text = costs.older([only(records)])
    assert records[0].run_id in text
    assert records[1].run_id not in text
    assert costs.older([only(records[1:])]) == ""
