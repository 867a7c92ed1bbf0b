"""Claims about advice: every combination is ranked or left out with a reason, the micro-batch found is the largest that
fits, records take the place of predictions only where they are of the same thing, and a letter's worth is what is left
without it.
"""

from __future__ import annotations

import copy
import dataclasses
import functools
import itertools
import json
import logging
import random
import subprocess
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from types import ModuleType
from typing import Any

import advise_harness
import pytest

import alone
import llmsys.bench
import llmsys.bench.advise
import llmsys.bench.predict
from llmsys import compose, job, schema
from llmsys.bench.advise import cells, measured, ranking, space, tables, task
from llmsys.bench.advise.cells import Cell, Predict
from llmsys.bench.advise.search import Search
from llmsys.bench.predict import predict
from llmsys.bench.techniques import Techniques
from llmsys.context import LightContext
from llmsys.cost.hardware import DEVICES
from llmsys.job import Record
from llmsys.track.jsonl import JsonLines

CARD = ["+exp=bench_advise", "hardware=rtx4090", "hardware.devices=2", "model.num_layers=2", "model.vocab_size=1000"]
FEW = "task.letters=[F,R,Z2,Z3,O,QL]"


@functools.cache
def config(*words: str) -> schema.Config:
    """Nobody changes it."""
    return schema.build(compose.compose([*CARD, *words]))


def asked(base: schema.Config, **settings: Any) -> schema.Config:
    """Another question about the same machine."""
    return dataclasses.replace(base, task=dataclasses.replace(space.advise(base), **settings))


@pytest.fixture(scope="module")
def base() -> schema.Config:
    return config(FEW)


@pytest.mark.parametrize("text", ["Naive", "F+R+Z3+O", "Z1+O8", "TP2+L", "F+Q8+Z2"])
def test_a_combination_is_configured_as_its_letters_compose(text: str) -> None:
    """Without Hydra, whose 0.1 s for each of some hundreds would be a minute."""
    shared = [*CARD, "train.world=2", "train.micro_batch=2", "train.global_batch=8", "hardware.devices=2"]
    whole = schema.build(compose.compose(["+exp=bench_predict", *shared[1:], f"techniques={text}"]))
    made = space.configured(config(), Techniques.parse(text), world=2, micro_batch=2, global_batch=8)
    for group in ("model", "train", "engine"):
        assert getattr(made, group) == getattr(whole, group)
    assert type(made.method) is type(whole.method)
    assert made.method.kind == whole.method.kind
    assert Techniques.of(made) == Techniques.parse(text)


def test_pre_training_trains_every_weight_and_fine_tuning_some_linear_ones(base: schema.Config) -> None:
    every = asked(base, letters=[])
    for stage in ("pretrain", "finetune"):
        found = space.space(asked(every, stage=stage))
        names = [str(each.techniques) for each in found.candidates]
        assert len(names) == len(set(names))
        assert not any(each.techniques.quantised and not each.techniques.adapter for each in found.candidates)
        assert any(each.techniques.adapter for each in found.candidates) == (stage == "finetune")
        whys = dict(line.removeprefix("techniques=").split(": ", 1) for line in found.left_out)
        assert not set(whys) & set(names)
        assert "without an adapter none of them is trained" in whys["Q"]
        assert "needs a Z" in whys["F+O"]
        letters = 2 * 2 * 4 * 2 * 6 * 2 * 2 * 2  # F, R, Z, O, the base and its adapter, O8, Q8, TP2
        assert len(names) + len(whys) == letters
    assert (
        "task.stage=finetune"
        in dict(line.removeprefix("techniques=").split(": ", 1) for line in space.space(every).left_out)["F+L"]
    )


def test_what_a_device_or_a_question_does_not_allow_has_its_reason(base: schema.Config) -> None:
    older = dataclasses.replace(base, hardware=dataclasses.replace(base.hardware, name="rtx3090"))
    whys = "\n".join(space.space(asked(older, letters=["F", "Q8"])).left_out)
    assert "techniques=Q8: of rtx3090 no 8-bit floats are known; rtx4090" in whys
    found = space.space(asked(base, stage="finetune", require=["QL", "Z3"]))
    assert {str(each.techniques) for each in found.candidates} == {
        *("Z3+QL", "F+Z3+QL", "R+Z3+QL", "F+R+Z3+QL", "Z3+O+QL", "F+Z3+O+QL", "R+Z3+O+QL", "F+R+Z3+O+QL")
    }
    with pytest.raises(ValueError, match=r"no combination of them is left; the last one: .*task\.stage=finetune"):
        space.space(asked(base, require=["QL"]))
    with pytest.raises(ValueError, match="X is no technique"):
        space.space(asked(base, letters=["F", "X"]))


def cell(size: int, peak: float, capacity: float, speed: float = 1.0) -> Cell:
    return Cell(
        techniques=Techniques(),
        world=1,
        micro_batch=size,
        examples=size,
        accumulation=1,
        fits=peak <= capacity,
        tokens_per_s=speed,
        step_ms=1.0,
        peak_bytes=round(peak),
        capacity_bytes=capacity,
        host_bytes=0,
        host_capacity_bytes=None,
        binds="compute",
    )


def test_the_largest_that_fits_is_found_in_few_predictions() -> None:
    """Of memory that is the largest of several straight lines, as a step's phases make it."""
    draw, probes = random.Random(0), []
    for _ in range(300):
        lines = [(draw.uniform(0, 900), draw.uniform(0, 30)) for _ in range(3)]

        def peak(size: int, lines: list[tuple[float, float]] = lines) -> int:
            return round(1000 * max(a + b * size for a, b in lines))

        search = Search(range(1, 513), lambda size, peak=peak: cell(size, peak(size), 1e6))  # type: ignore[misc]
        want = max((size for size in range(1, 513) if peak(size) <= 1e6), default=None)
        found = search.largest()
        assert (found.micro_batch if found else None) == want
        probes.append(len(search.seen))
    assert sorted(probes)[len(probes) // 2] <= 4
    assert max(probes) <= 14


@pytest.mark.parametrize("sizes", [[1, 2, 4, 8], [3], [2, 512]])
def test_of_few_sizes_the_fastest_is_the_fastest_of_all(sizes: list[int]) -> None:
    search = Search(sizes, lambda size: cell(size, 10 * size, 45, speed=-abs(size - 2.2)))
    fitting = [size for size in sizes if 10 * size <= 45]
    assert search.fastest().micro_batch == min(fitting, key=lambda size: abs(size - 2.2))  # type: ignore[union-attr]


GOALS: dict[str, Callable[[Cell], float]] = {
    "throughput": lambda each: each.tokens_per_s,
    "fit": lambda each: -each.peak_bytes,
    "batch": lambda each: each.examples,
    "cost": lambda each: -(each.usd or 0),
}


@pytest.mark.parametrize("predicted", [advise_harness.predict, predict], ids=["by rules of three", "as it predicts"])
@pytest.mark.parametrize("goal", GOALS)
def test_the_choice_is_the_best_of_all_by_its_goal(goal: str, predicted: Predict, base: schema.Config) -> None:
    """Tried one by one, over the micro-batches that are asked about."""
    sizes = [1, 3, 8]
    base = dataclasses.replace(base, hardware=dataclasses.replace(base.hardware, name="rtx3090", mem_gib=4.0))
    made = ranking.answer(asked(base, goal=goal, micro_batches=sizes), predicted)
    best = None
    for each in space.space(asked(base, goal=goal)).candidates:
        for size in sizes[:1] if goal == "fit" else sizes:
            found = space.configured(base, each.techniques, world=each.world, micro_batch=size, global_batch=0)
            one = cells.predicted(found, each.techniques, predicted(found))
            best = max(filter(None, (best, one if one.fits else None)), key=GOALS[goal], default=None)
    assert best is not None
    assert GOALS[goal](made.choice) == pytest.approx(GOALS[goal](best), rel=ranking.EVEN)
    least = GOALS[goal](best) - ranking.EVEN * abs(GOALS[goal](best))
    alike = [each for each in made.ranking if GOALS[goal](each) >= least]
    assert len(made.choice.techniques.letters) == min(len(each.techniques.letters) for each in alike)
    assert made.short, "so little memory that not all fits"
    values = [GOALS[goal](each) for each in made.ranking]
    assert all(a >= b or a == pytest.approx(b) for a, b in itertools.pairwise(values[1:]))
    assert made.margin_percent is not None
    assert made.margin_percent >= -100 * ranking.EVEN * 1.01
    assert (len({each.world for each in made.ranking}) == 2) == (goal == "cost"), "one device may be cheaper"


def test_a_letter_is_worth_what_is_left_without_it(base: schema.Config) -> None:
    small = dataclasses.replace(base, hardware=dataclasses.replace(base.hardware, mem_gib=3.6))
    made = ranking.answer(small, advise_harness.predict)
    assert made.choice.techniques.zero
    assert {drop.letter for drop in made.drops} == set(made.choice.techniques.letters)
    ranked = {str(each.techniques): each for each in (*made.ranking, *made.short)}
    for drop in made.drops:
        less = made.choice.techniques.without(drop.letter)
        assert drop.cell == ranked[str(less)]
    text = tables.markdown(made, small, "a machine")
    assert text.startswith(
        f"**{made.choice.techniques}, micro-batch {made.choice.micro_batch}**: llama2_7b on a machine"
    )
    assert "does not fit: needs" in text
    assert f"runner-up: {made.runner_up}" in text


def test_a_letter_that_the_stage_asks_for_cannot_be_dropped(base: schema.Config) -> None:
    made = ranking.answer(asked(base, stage="finetune", require=["QL"], goal="fit"), advise_harness.predict)
    dropped = {drop.letter: drop for drop in made.drops}
    assert dropped["L"].cell is None
    assert "without an adapter" in dropped["L"].why or "task.require" in dropped["L"].why
    assert "not allowed: " in tables.markdown(made, base, "a machine")


def test_where_nothing_fits_the_nearest_is_named(base: schema.Config) -> None:
    tiny = dataclasses.replace(base, hardware=dataclasses.replace(base.hardware, mem_gib=0.5))
    made = ranking.answer(tiny, advise_harness.predict)
    assert not made.ranking
    assert made.choice.peak_bytes == min(each.peak_bytes for each in made.short)
    assert tables.markdown(made, tiny, "a card").startswith("**Nothing fits.** ")
    assert task.summary(made)["fits"] == 0


def test_a_global_batch_is_kept_by_every_combination(base: schema.Config) -> None:
    made = ranking.answer(asked(base, global_batch=12, letters=["F", "Z2", "TP2"]), advise_harness.predict)
    for each in (*made.ranking, *made.short):
        assert each.examples * each.accumulation == 12
    assert {each.examples for each in made.ranking if each.techniques.tensor == 2} <= {1, 2, 3, 4, 6, 12}
    with pytest.raises(ValueError, match="no micro-batch on 2 ranks makes it"):
        ranking.answer(asked(base, global_batch=13, letters=["F"]), advise_harness.predict)


def test_where_a_batch_divides_on_some_ranks_alone_these_are_asked() -> None:
    """Cost is asked on fewer ranks too; a batch of 4 is no reason against 4, 2 and 1 of 8 devices."""
    eight = config("hardware.devices=8", "train.global_batch=4", "goal=cost", "task.letters=[F,TP8]")
    made = ranking.answer(eight, advise_harness.predict)
    every = (*made.ranking, *made.short)
    assert {each.world for each in every if each.techniques.tensor == 1} == {4, 2, 1}
    assert {each.world for each in every if each.techniques.tensor == 8} == {8}, "whose ranks share each example"
    assert "techniques=F: train.global_batch=4: no micro-batch on 8 ranks makes it" in made.left_out
    every_batch = {each.examples * each.accumulation for each in every}
    assert every_batch == {4}


def test_a_largest_batch_that_only_the_search_has_ended_says_so(base: schema.Config) -> None:
    """Of what fits at the end of the search nobody knows how much more would fit."""
    few = {"letters": ["F", "Z3"], "goal": "batch"}
    for settings, bound in (
        ({"most_micro_batch": 5}, "task.most_micro_batch=5"),
        ({"micro_batches": [2, 3]}, "task.micro_batches=[2,3]"),
        ({"global_batch": 12}, "train.global_batch=12"),
        ({"global_batch": 48, "most_micro_batch": 5}, "task.most_micro_batch=5"),
        ({"micro_batches": [4]}, ""),
    ):
        question = asked(base, **few, **settings)
        made = ranking.answer(question, advise_harness.predict)
        assert made.bound == bound
        assert made.next_size is None
        text = tables.markdown(made, question, "a machine")
        assert (f"largest batch (bounded by {bound})" in text.splitlines()[0]) == bool(bound)
        assert task.notes(made).get("micro_batch") == (f"bounded by {bound}" if bound else None)
    small = dataclasses.replace(base, hardware=dataclasses.replace(base.hardware, mem_gib=4.0))
    limited = ranking.answer(asked(small, **few), advise_harness.predict)
    assert limited.next_size is not None
    assert limited.bound == "", "memory ends it"


def test_what_is_typed_of_the_batch_and_the_goal_is_what_is_asked() -> None:
    typed = space.advise(config("goal=batch", "train.micro_batch=4", "train.global_batch=16", "emit=there"))
    assert (typed.goal, typed.micro_batches, typed.global_batch, typed.emit) == ("batch", [4], 16, "there")
    untyped = space.advise(config())
    assert (untyped.goal, untyped.micro_batches, untyped.global_batch) == ("throughput", [], 0)
    with pytest.raises(ValueError, match=r"task\.goal=speed: must be one of throughput, fit, batch, cost"):
        config("goal=speed")


def test_fine_tuning_is_predicted_on_padded_rows_unless_others_are_asked_for() -> None:
    """As long as Alpaca's, on which what is emitted trains: rows of one length carry no mask, and cost less."""
    tuned = config("task.stage=finetune")
    assert tuned.data == schema.build(compose.compose([*CARD, "data=alpaca_lengths"])).data
    assert config().data.kind == "synthetic", "pre-training packs its rows"
    assert config("task.stage=finetune", "data=synthetic").data.kind == "synthetic"
    assert config("task.stage=finetune", "data=code_docstrings").data.kind == "code_docstrings"
    fused = {"letters": ["F"], "require": ["F"], "micro_batches": [8]}
    (masked,), (plain,) = (ranked(asked(each, stage="finetune", **fused)) for each in (tuned, config()))
    assert masked.peak_bytes > plain.peak_bytes


def run_of(base: schema.Config, text: str, size: int, **changes: Any) -> Record:
    """A record of training as that combination stands for it, on two of the card; `changes` with a dot are settings."""
    made = space.configured(base, Techniques.parse(text), world=2, micro_batch=size, global_batch=0)
    plain = copy.deepcopy(dataclasses.asdict(made))
    plain["task"] = {"kind": "train"}
    plain["dispatch"]["kind"] = "process"
    for key in [key for key in changes if "." in key]:
        group, _, name = key.partition(".")
        plain[group][name] = changes.pop(key)
    summary = {"tokens_per_s": 100.0, "step_ms_p50": 7.0, "peak_gib": 2.0, "accounted_bytes": 1.0}
    card = DEVICES[base.hardware.name]
    env = {"device_name": f"NVIDIA {card.title.removesuffix(' 10 GB')}", "device_memory_gib": card.mem_gib}
    env |= changes.pop("env", {})
    known: dict[str, Any] = {"status": "ok", "summary": summary, "env": env, "run_id": f"{text} {size}", **changes}
    return Record(name="n", task="train", config=plain, **known)


def test_runs_of_the_same_cell_take_the_place_of_its_prediction(base: schema.Config, tmp_path: Path) -> None:
    """And tell of other cells by how much predictions are off, so that what was never run does not win by that.

    By the time of a step: tokens a second of a run leave padding out.
    """
    plain = {str(each.techniques): each for each in ranked(asked(base, micro_batches=[2, 3]))}
    size_2 = {str(each.techniques): each for each in ranked(asked(base, micro_batches=[2]))}
    predicted = size_2["F+Z2"]
    slow = {"tokens_per_s": 1.0, "peak_gib": 2.0}
    records = [
        run_of(base, "F+Z2", 2, summary={**slow, "step_ms_p50": 5.0 * predicted.step_ms}),
        run_of(base, "F+Z2", 2, summary={**slow, "step_ms_p50": 3.0 * predicted.step_ms}, run_id="again"),
        run_of(base, "F", 3, env={"device_name": "NVIDIA GeForce RTX 4090 Laptop GPU"}),
        run_of(base, "Z3", 3, status="oom", summary={}),
        run_of(base, "R", 2, **{"model.hidden_size": 512}),
    ]
    for index, record in enumerate(records):
        (tmp_path / str(index)).mkdir()
        record.write(tmp_path / str(index))
    found = measured.read(base, tmp_path)
    assert {record.run_id for record in found} == {"F+Z2 2", "again", "Z3 3"}
    one = {str(each.techniques): each for each in ranked(asked(base, micro_batches=[2]), found)}
    own, ratio = one["F+Z2"], 1 / 4
    assert own.measured
    assert own.runs == ("F+Z2 2", "again")
    assert own.step_ms == pytest.approx(4 * predicted.step_ms), "the mean of repeats"
    assert own.tokens_per_s == pytest.approx(ratio * predicted.tokens_per_s)
    assert own.peak_bytes == 2 * 2**30
    for name, each in one.items():
        if name != "F+Z2":
            assert not each.measured
            assert each.correction == pytest.approx(ratio)
            assert each.tokens_per_s == pytest.approx(ratio * size_2[name].tokens_per_s)
    both = {str(each.techniques): each for each in ranked(asked(base, micro_batches=[2, 3]), found)}
    assert both["F+Z2"].micro_batch == 3
    assert both["F+Z2"].tokens_per_s == pytest.approx(ratio * plain["F+Z2"].tokens_per_s)
    assert both["Z3"].micro_batch == 2, "3 was seen to run out of memory"
    made = ranking.answer(asked(base, micro_batches=[2], require=["Z2"]), advise_harness.predict, found)
    assert "runs" in tables.markdown(made, base, "a card")
    assert f"prediction x {ratio:.2f}" in tables.markdown(made, base, "a card")


SLOW = {"network.name": "eth100m", "network.up_mbit": 100.0, "network.down_mbit": 100.0}
HERE = {"network.up_mbit": None, "network.down_mbit": None}
PADDED = {"data.kind": "synthetic_pairs"}


@pytest.mark.parametrize(
    ("card", "question", "changes", "why"),
    [
        ("rtx4090", [], {}, ""),
        ("rtx4090", [], {**SLOW, "env": {"network": {"shaped": True}}}, "over another network"),
        ("rtx4090", [], {**SLOW, "env": {"network": {"shaped": False}}}, ""),
        ("rtx4090", [], SLOW, "over another network"),
        ("rtx4090", ["network=eth100m"], HERE, "over another network"),
        ("rtx4090", ["network=eth100m"], {"env": {"network": {"shaped": True}}}, ""),
        ("rtx4090", ["network=eth100m"], {"env": {"network": {"shaped": False}}}, "over another network"),
        ("rtx3090", [], {"hardware.nvlink": False}, "with other numbers of hardware"),
        ("rtx3090", ["hardware.nvlink=false"], {"hardware.nvlink": True}, "with other numbers of hardware"),
        ("rtx3090", ["hardware.nvlink=false"], {}, ""),
        ("rtx4090", ["hardware.tflops=330"], {"hardware.tflops": None}, "with other numbers of hardware"),
        ("rtx4090", ["hardware.host_gbps=8"], {"hardware.host_gbps": None}, ""),
        ("rtx4090", [], PADDED, "of padded rows"),
        ("rtx4090", ["data=alpaca_lengths"], {"data.kind": "synthetic"}, "of rows without padding"),
        ("rtx4090", ["data=alpaca_lengths"], {}, ""),
        ("rtx4090", [], {"status": "oom", "dispatch.memory_gib": 1.0}, "that had less memory"),
        ("rtx4090", ["hardware.mem_gib=48"], {"status": "oom"}, "that had less memory"),
        ("rtx4090", ["hardware.mem_gib=12"], {"status": "oom"}, ""),
        ("rtx4090", [], {"status": "oom", "env": {"sweep": {"clean": False}}}, "that ran out of memory beside others"),
    ],
)
def test_a_run_of_another_thing_does_not_count(
    card: str, question: list[str], changes: dict[str, Any], why: str
) -> None:
    """Each of these would else stand in the place of the prediction, and correct all others."""
    asked_of = config(f"hardware={card}", FEW, *question)
    found = measured.by_cell(asked_of, space.space(asked_of).candidates, [run_of(asked_of, "F+Z2", 2, **changes)])
    assert found.unlike == ({why: 1} if why else {})
    assert [(str(each.techniques), *sizes) for each, sizes in found.runs.items()] == ([] if why else [("F+Z2", 2)])


@pytest.mark.parametrize(("gib", "counts"), [(9.78, True), (9.64, True), (11.76, False), (None, False)])
def test_a_card_is_known_by_its_name_and_its_memory(gib: float | None, counts: bool, tmp_path: Path) -> None:
    """An RTX 3080 of 12 GB, which has more cores, reports the name of one of 10 GB."""
    asked_of = config("hardware=rtx3080", FEW)
    record = run_of(asked_of, "F", 2)
    record.env["device_memory_gib"] = gib
    record.write(tmp_path)
    assert bool(measured.read(asked_of, tmp_path)) == counts
    found = measured.by_cell(asked_of, space.space(asked_of).candidates, [record])
    assert bool(found.runs) == counts


@pytest.mark.parametrize(
    ("device", "env", "threads", "counts"),
    [
        ("cpu", {}, 2, True),
        ("cpu", {}, 1, False),
        ("cpu", {"device_name": "another CPU"}, 2, False),
        ("cuda", {"device_memory_gib": 16.1}, 1, True),
        ("cuda", {"device_memory_gib": 24.0}, 1, False),
        ("cuda", {}, 1, False),
    ],
)
def test_of_a_calibrated_machine_its_own_runs_count(
    device: str, env: dict[str, Any], threads: int, counts: bool, tmp_path: Path
) -> None:
    """A CPU's with as many threads of a rank."""
    calibration = {
        "task": "bench_calibrate",
        "status": "ok",
        "env": {"device_name": "this one"},
        "summary": {"mem_gib": 16.0},
        "config": {"hardware": {"device": device}, "train": {"threads": 2}},
    }
    (tmp_path / "record.json").write_text(json.dumps(calibration), encoding="utf-8")
    card = config(FEW)
    record = run_of(card, "F", 2, **{"train.threads": threads, "hardware.name": "auto"})
    record.env = {"device_name": "this one", **env}
    here = asked(card, speeds=str(tmp_path))
    here = dataclasses.replace(here, hardware=dataclasses.replace(here.hardware, name="auto"))
    found = measured.by_cell(here, space.space(here).candidates, [record])
    assert bool(found.runs) == counts


def test_runs_that_do_not_count_are_told_of(base: schema.Config) -> None:
    record = run_of(base, "F+Z2", 2, **PADDED)
    made = ranking.answer(base, advise_harness.predict, [record, record])
    assert not any(each.measured or each.correction != 1 for each in (*made.ranking, *made.short))
    assert "runs of these combinations that do not count: 2 of padded rows" in tables.markdown(made, base, "a card")


def ranked(question: schema.Config, records: Sequence[Record] = ()) -> tuple[Cell, ...]:
    return ranking.answer(question, advise_harness.predict, records).ranking


def light(out: Path) -> LightContext:
    out.mkdir(parents=True, exist_ok=True)
    log = logging.getLogger("llmsys")
    return LightContext(out=out, threads=1, code_hash="", log=log, metrics=JsonLines(out / "metrics.jsonl"))


def test_the_task_leaves_the_answer_every_cell_and_what_to_run(base: schema.Config, tmp_path: Path) -> None:
    wanted = asked(base, emit=str(tmp_path / "there"), letters=["R", "Z3", "O"], require=["Z3"])
    made = task.advised(wanted, light(tmp_path / "run"), advise_harness.predict, machine="two cards", cuda=True)
    choice = Techniques.parse(made["notes"]["choice"])
    assert choice.zero == 3
    found = json.loads((tmp_path / "run" / "advice.json").read_text())
    assert len(found["ranking"]) + len(found["short"]) == made["summary"]["combinations"] == 4
    assert len(found["left_out"]) == made["summary"]["combinations_left_out"]
    assert (tmp_path / "run" / "advice.md").read_text().startswith(f"**{choice}, micro-batch ")
    settings = json.loads((tmp_path / "there" / "ds_config.json").read_text())
    assert settings["zero_optimization"]["stage"] == 3
    assert settings["train_micro_batch_size_per_gpu"] == made["summary"]["micro_batch"]
    assert "- to run: run.sh, torchrun.sh, ds_config.json in " in (tmp_path / "run" / "advice.md").read_text()
    line = (tmp_path / "there" / "torchrun.sh").read_text()
    assert f"--per_device_train_batch_size={settings['train_micro_batch_size_per_gpu']} " in line
    assert f"techniques={choice} " in (tmp_path / "there" / "run.sh").read_text()


def test_where_it_writes_is_no_part_of_what_a_run_is_and_what_it_reads_is(base: schema.Config, tmp_path: Path) -> None:
    words = [*CARD, FEW, f"results={tmp_path / 'results'}"]
    plain = job.make(compose.compose(words))
    emitted = job.make(compose.compose([*words, f"emit={tmp_path / 'there'}"]))
    assert emitted.run_id == plain.run_id
    assert emitted.config["reuse"] == "never", "a finished record would write nothing"
    (tmp_path / "runs" / "one").mkdir(parents=True)
    run_of(base, "F+Z2", 2).write(tmp_path / "runs" / "one")
    read = job.make(compose.compose([*words, f"task.records={tmp_path / 'runs'}"]))
    assert read.run_id != plain.run_id
    assert read.inputs["records"] == str(tmp_path / "runs")
    with pytest.raises(ValueError, match=r"task\.records=nowhere: no such folder"):
        job.make(compose.compose([*words, "task.records=nowhere"]))


@pytest.mark.parametrize("package", [llmsys.bench, llmsys.bench.predict, llmsys.bench.advise])
def test_public_names_are_found_late(package: ModuleType) -> None:
    alone.check_names(package)


def test_public_names_need_no_torch() -> None:
    code = (
        "import sys; import llmsys.bench, llmsys.bench.advise, llmsys.bench.predict; "
        "print('llmsys.schema' in sys.modules); "
        "from llmsys.bench import Answer, Machine, Prediction, Techniques, answer; "
        "from llmsys.bench.advise import Cell; from llmsys.bench.predict import predict; "
        "print('torch' in sys.modules, 'hydra' in sys.modules, predict.__name__, answer.__name__)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.split() == ["False", "False", "False", "predict", "answer"]


COMMAND = """
import sys
from llmsys import main
sys.argv[1:] = {words!r}
try:
    main.main()
finally:
    print("torch" in sys.modules, file=sys.stderr)
"""


def test_the_command_says_the_answer_first_and_needs_no_torch(tmp_path: Path) -> None:
    """By the real prediction; what it writes is written again, though the run is finished."""
    there = tmp_path / "there"
    words = ["+exp=bench_advise", "model=llama_tiny", "hardware=rtx4090x8", "goal=batch", "task.letters=[F,R,Z3]"]
    words += ["task.most_micro_batch=4", "train.length=32", f"emit={there}", f"results={tmp_path / 'results'}"]
    for _ in range(2):
        program = [sys.executable, "-c", COMMAND.format(words=words)]
        done = subprocess.run(program, capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stderr
        assert done.stderr.splitlines()[-1] == "False"
        (first, *_) = filter(None, done.stdout.splitlines())
        assert first.startswith(
            "**Naive, micro-batch 4**: llama_tiny on 8 x GeForce RTX 4090, pre-training, largest batch (bounded by "
            "task.most_micro_batch=4); "
        )
        (there / "run.sh").unlink()
