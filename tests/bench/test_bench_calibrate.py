"""Claims about calibrations: they are the machine that is predicted, what they cannot tell is refused, and said."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest
from predict_harness import A800, ROOT, config, predicted

from llmsys import compose, main, runner
from llmsys.bench.predict import machine as machines
from llmsys.bench.predict import scales, steps, tables
from llmsys.bench.predict.prediction import predict
from llmsys.cost import case as cases
from llmsys.cost import flops, walk
from llmsys.cost.case import Case
from llmsys.cost.links import Line
from llmsys.cost.room import GIB, SLACK


def test_two_cells_tell_work_and_starts_apart() -> None:
    planted = [scales.Seen(work, start, 1.5 * work + 3 * start) for work, start in ((1.0, 0.2), (0.05, 0.1))]
    assert scales.factors(planted, behind=False)[:2] == pytest.approx((1.5, 3.0))
    alike = [scales.Seen(1.0, 0.2, 2.4), scales.Seen(2.0, 0.4, 4.8)]
    assert scales.factors(alike, behind=False)[:2] == pytest.approx((2.0, 2.0)), "proportional cells: one factor"
    hidden = [scales.Seen(1.0, 0.2, 1.3), scales.Seen(0.05, 0.1, 0.2)]
    assert scales.factors(hidden, behind=True)[:2] == pytest.approx((1.3, 2.0)), (
        "each side by the cells where it is longer"
    )
    with pytest.raises(ValueError, match="0 cells"):
        scales.factors([], behind=True)


def test_factors_that_were_not_fitted_say_why() -> None:
    alike = [scales.Seen(1.0, 0.2, 2.4), scales.Seen(2.0, 0.4, 4.8)]
    assert "too alike" in scales.factors(alike, behind=False).why
    wild = [scales.Seen(1.0, 0.01, 1.0), scales.Seen(0.1, 0.01, 1.0)]
    found = scales.factors(wild, behind=False)
    assert found.work == found.start
    assert re.search(r"out of bounds: .* for work \(0.2 to 5\), 100 for starts \(0.2 to 50\); .* for both", found.why)
    one_sided = scales.factors([scales.Seen(1.0, 0.1, 1.2), scales.Seen(0.5, 0.1, 0.6)], behind=True)
    assert one_sided == (pytest.approx(1.2), pytest.approx(1.2), one_sided.why)
    assert "same side" in one_sided.why
    sane = [scales.Seen(work, start, 1.5 * work + 3 * start) for work, start in ((1.0, 0.2), (0.05, 0.1))]
    assert not scales.factors(sane, behind=False).why


def test_a_model_may_start_operators_far_more_slowly_than_torch() -> None:
    """Through modules in Python, on a CPU; a GPU's host is measured in what hides it."""
    cells = [scales.Seen(work, start, work + 20 * start) for work, start in ((0.4, 0.001), (0.03, 0.001))]
    assert scales.factors(cells, behind=False) == (pytest.approx(1.0), pytest.approx(20.0), "")


def measured(world: int = 1, **more: float) -> dict[str, Any]:
    """A calibration's record in which all arithmetic goes at 10 GFLOP/s, and memory at 5 GB/s."""
    rates = {f"rate/product/fp32/{size:.6g}": 1e10 for size in (1e5, 1e9)}
    summary = {**rates, "rate/stream/1000": 5e9, "start/forward": 1e-6, "start/backward": 1e-6, "mem_gib": 16.0,
               "host_gib": 16.0, "peak_tflops/fp32": 0.02, "copy_gb_per_s": 8.0, "host_adam_gb_per_s": 4.0,
               "data_ms": 2.0, **more}  # fmt: skip
    settings = {"hardware": {"device": "cpu"}, "train": {"threads": 2}}
    return {"task": "bench_calibrate", "status": "ok", "run_id": "abc", "world": world, "summary": summary,
            "env": {"device_name": "a CPU"}, "config": settings}  # fmt: skip


SMALL = ("model=llama_6m", "model.dtype=fp32", "train.precision=fp32", "engine=local", "hardware=auto")


def test_a_calibration_is_the_machine(tmp_path: Path) -> None:
    (tmp_path / "record.json").write_text(json.dumps(measured()), encoding="utf-8")
    given = config(*SMALL, f"task.speeds={tmp_path}")
    found = predict(given)
    parts = (given.model, given.train, given.method, given.engine)
    assert found.step_ms > 1e3 * flops.step_flops(*parts, **cases.facts(given, "cpu")) / 1e10
    assert found.by_phase_ms["data"] == 2.0
    assert found.capacity_bytes == int((1 - SLACK) * 16 * GIB)
    twice = machines.calibrated(measured(**{"scale/forward/work": 2.0, "scale/forward/start": 2.0}), given)
    assert predict(given, twice).by_phase_ms["forward"] == pytest.approx(2 * found.by_phase_ms["forward"])
    assert "1 rank of 2 threads of a CPU" in found.note
    (tmp_path / "record.json").write_text(json.dumps({**measured(), "task": "train"}), encoding="utf-8")
    with pytest.raises(ValueError, match="not a finished run of bench_calibrate, but of train"):
        predict(given)


@pytest.mark.parametrize(
    ("words", "line"),
    [
        ((A800,), "hardware.name=a800: task.speeds=.*another machine.*hardware=auto"),
        (("hardware.tflops=5",), "hardware.tflops=5: task.speeds=.*measured"),
        (
            ("train.precision=bf16",),
            r"train.precision=bf16: task.speeds=.* in fp32; run .*_calibrate train.precision=bf16",
        ),
        (("model.dtype=bf16", "train.precision=bf16"), "train.precision=bf16: task.speeds="),
        (("engine=ddp", "train.world=2", "train.global_batch=2"), "train.world=2: task.speeds=.*1 rank.*train.world=2"),
    ],
)
def test_what_a_calibration_cannot_tell_is_refused(words: tuple[str, ...], line: str, tmp_path: Path) -> None:
    (tmp_path / "record.json").write_text(json.dumps(measured()), encoding="utf-8")
    with pytest.raises(ValueError, match=line) as refused:
        predicted(*SMALL, *words, f"task.speeds={tmp_path}")
    assert "\n" not in str(refused.value)


WRITTEN = [ROOT / "docs" / "bench.md", ROOT / "conf" / "exp" / "bench_calibrate.yaml"]


def documented(path: Path) -> tuple[list[str], list[str]]:
    """(a calibration, a prediction from it but for the run's id), as the file has them."""
    text = path.read_text(encoding="utf-8")
    (calibrate,) = re.findall(r"python -m llmsys (\+exp=bench_calibrate\b.*)", text)
    (predict,) = re.findall(
        r"python -m llmsys (\+exp=bench_predict .*task\.speeds=)results/bench_calibrate/<run id>", text
    )
    return calibrate.split(), predict.split()


@pytest.mark.parametrize("path", WRITTEN, ids=lambda path: path.name)
def test_the_documented_prediction_goes_by_a_calibration_in_its_own_precision(path: Path, tmp_path: Path) -> None:
    """Of a calibration as it is documented, which has fp32 alone."""
    calibrate, predict = documented(path)
    own = compose.compose(calibrate)
    assert {own["train"]["precision"], "fp32"} == {"fp32"}
    (tmp_path / "record.json").write_text(json.dumps(measured()), encoding="utf-8")
    predict[-1] += str(tmp_path)
    (made,) = main.make_jobs([compose.compose([*predict, f"results={tmp_path}"])])
    record = runner.run(made)
    assert record.status == "ok", record.error


@pytest.mark.slow
@pytest.mark.parametrize("path", WRITTEN, ids=lambda path: path.name)
def test_calibrating_and_predicting_work_as_they_are_documented(path: Path, tmp_path: Path) -> None:
    calibrate, predict = documented(path)
    smoke = compose.compose(calibrate)["smoke"]
    (first,) = main.make_jobs([compose.compose([*calibrate, *smoke, f"results={tmp_path}"])])
    measured_here = runner.run(first)
    assert measured_here.status == "ok", measured_here.error
    predict[-1] += first.out
    (second,) = main.make_jobs([compose.compose([*predict, f"results={tmp_path}"])])
    record = runner.run(second)
    assert record.status == "ok", record.error
    assert record.summary["predicted_step_ms"] > 0
    assert f"run {first.run_id}" in record.notes["made"]


FALLBACKS = "scale/forward: one factor; 4-bit weights: not measured, for bitsandbytes is not installed"


@pytest.mark.parametrize(
    ("words", "lines"),
    [
        (
            (),
            [
                FALLBACKS,
                "no whole steps (task.cells)",
                "attention/fp32: no speed of it is known; predicted at that of p",
            ],
        ),
        (("model.quant=nf4",), ["dequant: no speed of it is known; predicted at that of stream"]),
        (("hardware.devices=2", "engine=ddp", "train.world=1"), []),
    ],
)
def test_what_stands_for_what_was_not_measured_is_said(
    words: tuple[str, ...], lines: list[str], tmp_path: Path
) -> None:
    """In the record, and in what is printed."""
    record = {**measured(), "notes": {"fallbacks": FALLBACKS}}
    (tmp_path / "record.json").write_text(json.dumps(record), encoding="utf-8")
    given = config(*SMALL, *words, "model.attention=sdpa", f"task.speeds={tmp_path}")
    found = predict(given)
    text = tables.markdown(given, machines.of(given), found)
    for line in lines:
        assert line in found.note
        assert line in text


def test_a_calibration_says_what_it_fell_back_to() -> None:
    """Communication that would be most of a backward pass is taken off by half of it at most."""
    from llmsys.bench.predict import calibrate

    given = config(*SMALL[:3], "engine=ddp", "hardware=auto", "train.world=2", "train.global_batch=2")
    machine = machines.measured(measured(2, **{"alpha_s/all_reduce": 0.0, "beta_s/all_reduce": 1e-6}), given)
    took = {"forward_ms": 50.0, "backward_ms": 100.0, "optimizer_ms": 5.0}
    _, said = calibrate.fitted(machine, [(given, took)])
    assert any(line.startswith("cell 0, backward: ") and "half was taken off" in line for line in said)
    assert any(line.startswith("scale/optimizer: ") for line in said), "one cell tells no two factors"


def test_ranks_of_a_cpu_share_its_memory_and_hide_nothing() -> None:
    line = {"alpha_s/all_reduce": 1e-4, "beta_s/all_reduce": 1e-9}
    given = config(*SMALL[:3], "engine=ddp", "hardware=auto", "train.world=2", "train.global_batch=2")
    machine = machines.calibrated(measured(2, **line), given)
    found = predict(given, machine)
    assert found.capacity_bytes == int((1 - SLACK) * 8 * GIB)
    assert found.host_bytes == 0
    nbytes = 4 * 5_701_376
    assert found.by_phase_ms["comm"] == pytest.approx(1e3 * Line(1e-4, 1e-9).seconds("all_reduce", nbytes, 2), rel=0.01)


def test_passes_without_factors_are_what_factors_are_fitted_to() -> None:
    given = config(*SMALL)
    machine = machines.calibrated(measured(**{"scale/forward/work": 3.0, "scale/forward/start": 3.0}), given)
    case = Case(given.model, given.train, given.method, given.engine, **cases.facts(given, "cpu"))
    bare = steps.alone(case, walk.run(case), machine)
    assert predict(given, machine).by_phase_ms["forward"] == pytest.approx(3e3 * bare["forward"].total)
