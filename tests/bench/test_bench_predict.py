"""Claims about predictions: identities between their parts, what saves and costs what, and what is said of the rest."""

from __future__ import annotations

import dataclasses
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from predict_harness import A800, BENCHMARKS, config, ideal, predicted

from llmsys import compose, main, runner
from llmsys.bench.predict import machine as machines
from llmsys.bench.predict import steps, tables
from llmsys.bench.predict.prediction import predict, resolved
from llmsys.cost import case as cases
from llmsys.cost import flops, walk
from llmsys.cost.case import Case
from llmsys.cost.links import Line
from llmsys.cost.room import CONTEXT_GIB, GIB, NCCL_GIB, SLACK
from llmsys.cost.work import AGAIN, FORWARD


def test_the_question_of_the_readme_is_answered_without_torch() -> None:
    code = (
        "import sys; from llmsys import compose, schema; from llmsys.bench.predict.prediction import predict; "
        f"words = ['+exp=bench_predict', 'model=llama2_70b', '{A800}', 'techniques=Z3+O+R']; "
        "c = schema.build(compose.compose(words)); "
        "p = predict(c); print(p.fits, p.binds, c.train.world, 'torch' in sys.modules)"
    )
    made = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert made.stdout.split() == ["False", "memory", "8", "False"], "of the host, which has 512 GiB"


def test_the_task_writes_what_was_predicted(tmp_path: Path) -> None:
    made = main.make_jobs([compose.compose(["+exp=bench_predict", A800, "techniques=F+Z3", f"results={tmp_path}"])])
    record = runner.run(made[0])
    found = predicted(A800, "techniques=F+Z3")
    assert record.status == "ok", record.error
    assert record.summary["predicted_step_ms"] == pytest.approx(found.step_ms)
    assert record.summary["predicted_peak_gib"] == pytest.approx(found.peak_bytes / GIB)
    assert record.notes["binds"] == found.binds
    text = (Path(made[0].out) / "prediction.md").read_text(encoding="utf-8")
    assert "8 ranks" in text
    assert "Fits" in text
    assert "not calibrated" in text


@pytest.mark.parametrize(
    "words",
    [
        (),
        ("techniques=R",),
        ("techniques=F+R", "train.global_batch=16"),
        ("method=lorafa", "train.recompute=mlp", "model.dtype=fp32", "train.precision=fp32"),
        ("techniques=QL",),
        ("techniques=F", "train.loss=chunked"),
        ("model=t5_base", "techniques=L", "data=code_docstrings"),
        ("model=gpt2", "techniques=R", "model.dtype=fp32"),
        ("model=resnet50", "data=digits"),
    ],
)
def test_operators_are_all_of_the_arithmetic(words: tuple[str, ...]) -> None:
    """And so a machine that does nothing else takes FLOPs over rate."""
    given = config(A800, *words)
    parts = (given.model, given.train, given.method, given.engine)
    known = cases.facts(given, "cuda")
    tape = walk.run(Case(*parts, **known))
    own = sum(op.flops for ops in tape.ops.values() for op in ops if op.passed == FORWARD)
    assert own == pytest.approx(sum(tape.forward.values()), rel=1e-9)
    again = sum(op.flops for ops in tape.ops.values() for op in ops if op.passed == AGAIN)
    assert again == pytest.approx(sum(tape.again.values()), rel=1e-9)
    found = predict(given, ideal())
    assert found.step_ms == pytest.approx(1e3 * flops.step_flops(*parts, **known) / 1e12, rel=1e-6)
    assert found.binds == ("compute" if found.fits else "memory")


@pytest.mark.parametrize("techniques", ["Naive", "F+R+Z3+O", "Z2", "Z2+O", "F+QL", "TP8", "F+R+LFA+Z3"])
def test_parts_add_up(techniques: str) -> None:
    found = predicted(A800, f"techniques={techniques}")
    assert sum(found.by_phase_ms.values()) == pytest.approx(found.step_ms)
    assert sum(found.spent_ms.values()) == pytest.approx(found.step_ms)
    assert found.peak_bytes == max(phase.device_bytes for phase in found.phases)
    assert all(phase.device_bytes == sum(phase.device.values()) for phase in found.phases)
    assert min(found.by_phase_ms.values()) >= 0


def test_each_letter_saves_what_it_is_for() -> None:
    plain = predicted(A800, "techniques=Naive")
    again, fused = predicted(A800, "techniques=R"), predicted(A800, "techniques=F")
    assert again.peak_bytes < plain.peak_bytes
    assert again.by_phase_ms["backward"] > plain.by_phase_ms["backward"]
    assert again.by_phase_ms["forward"] == plain.by_phase_ms["forward"]
    assert fused.peak_bytes < plain.peak_bytes
    assert fused.step_ms < plain.step_ms
    two, three = predicted(A800, "techniques=Z2"), predicted(A800, "techniques=Z3")
    away = predicted(A800, "techniques=Z3+O")
    assert plain.peak_bytes > two.peak_bytes > three.peak_bytes > away.peak_bytes
    assert away.host_bytes > 0 == three.host_bytes
    assert away.step_ms > three.step_ms
    assert away.binds == "host"
    assert predicted(A800, "techniques=O8").peak_bytes < plain.peak_bytes


def test_faster_parts_never_make_a_step_slower() -> None:
    given = config(A800, "techniques=F+Z3")
    machine = machines.of(given)
    before = predict(given, machine).step_ms
    double = {name: tuple((size, 2 * rate) for size, rate in curve) for name, curve in machine.speeds.curves.items()}
    fast = dataclasses.replace(machine.speeds, curves=double)
    assert predict(given, dataclasses.replace(machine, speeds=fast)).step_ms < before
    wide = {"all": Line(machine.lines["all"].alpha_s / 2, machine.lines["all"].beta_s / 2)}
    assert predict(given, dataclasses.replace(machine, lines=wide)).step_ms < before
    assert predict(given, dataclasses.replace(machine, overlaps=False)).step_ms >= before


def test_ddp_hides_all_but_the_last_bucket_behind_its_backward_pass() -> None:
    given = config(A800)
    machine = machines.of(given)
    slow = {"all": Line(0.0, 1e-12)}  # a terabyte a second: less than the backward pass
    shown = predict(given, dataclasses.replace(machine, lines=slow)).by_phase_ms["comm"]
    whole = predict(given, dataclasses.replace(machine, lines=slow, overlaps=False)).by_phase_ms["comm"]
    assert 0 < shown < whole / 100, "of about 500 buckets"


def test_an_offloaded_update_is_adamw_clipping_and_a_cast_of_the_weights() -> None:
    """28, 8 and 4 + 2 bytes a parameter of a model in bf16, of all ranks; the rest is the device's. The paper of
    ZeRO-Offload has AdamW alone at 0.22 s for 10**9 parameters."""
    given = config(A800, "techniques=Z2+O")
    numel = steps.Sizes.of(
        Case(given.model, given.train, given.method, given.engine, **cases.facts(given, "cuda"))
    ).numel
    slow = ideal(host_bytes_per_s=1e9)
    assert predict(given, slow).by_phase_ms["optimizer"] == pytest.approx(numel * 42e-6, rel=1e-3)
    unclipped = config(A800, "techniques=Z2+O", "train.clip=0")
    assert predict(unclipped, slow).by_phase_ms["optimizer"] == pytest.approx(numel * 34e-6, rel=1e-3)
    cited = ideal(host_bytes_per_s=machines.HOST_BYTES_PER_S)
    assert predict(unclipped, cited).by_phase_ms["optimizer"] == pytest.approx(220e-9 * numel * 34 / 28, rel=1e-3)


@pytest.mark.parametrize(("techniques", "once", "twice"), [("Z2+O", 4 + 2, 4 + 2 + 6), ("Z3+O", 4 + 8, 4 + 16)])
def test_gradients_go_to_the_host_in_fp32(techniques: str, once: int, twice: int) -> None:
    """Bytes of a rank's elements over PCIe in bf16, of one micro-batch and of two. With ZeRO-3 the weights go to the
    device in either pass, and each micro-batch's gradients to the host and back."""
    for micro, wanted in ((1, once), (2, twice)):
        given = config(A800, f"techniques={techniques}", f"train.global_batch={8 * micro}")
        slow = ideal(copy_bytes_per_s=1e9, overlaps=False)
        case = Case(given.model, given.train, given.method, given.engine, **cases.facts(given, "cuda"))
        share = steps.Sizes.of(case).share
        assert predict(given, slow).by_phase_ms["offload"] == pytest.approx(wanted * share * 1e-6, rel=1e-3)


def test_messages_of_tensor_parallelism_are_as_wide_as_the_products() -> None:
    """One for each matrix of a block, forward and backward: their latency is counted so often, in fp32 too."""
    words = (A800, "techniques=TP8", "model.num_layers=4", "model.vocab_size=800")
    latency = ideal(lines={"all": Line(1.0, 1e-30)}, peak={"bf16": 1e12, "fp32": 1e12})
    wide = ("model.dtype=fp32", "train.precision=fp32")
    counts = [predict(config(*words, *how), latency).by_phase_ms["comm"] for how in ((), wide)]
    assert counts[0] == pytest.approx(counts[1])


def test_what_does_not_fit_says_so() -> None:
    found = predicted("hardware=rtx4090x8", "techniques=Naive")
    assert not found.fits
    assert found.binds == "memory"
    given = config("hardware=rtx4090x8")
    assert "Does not fit" in tables.answer(given, machines.of(given), found)
    short = predicted(A800, "model=llama2_70b", "techniques=Z3+O+R")
    assert not short.fits
    assert short.peak_bytes < short.capacity_bytes / 10
    assert short.host_bytes > 2 * (short.host_capacity_bytes or 0)
    roomy = predicted(A800, "model=llama2_70b", "techniques=Z3+O+R", "hardware.host_gib=2048")
    assert roomy.fits
    assert roomy.binds == "host"


def test_money_is_rent_over_tokens() -> None:
    found = predicted("hardware=rtx4090x8", "techniques=F+R+Z3")
    assert found.usd_per_million_tokens == pytest.approx(8 * 0.34 / 3600 / found.tokens_per_s * 1e6)
    assert predicted("hardware=a800x8").usd_per_million_tokens is None, "no price is known"


def test_auto_recomputation_is_chosen_for_the_machine_at_hand() -> None:
    words = ("model=llama2_13b", "method=lorafa", "engine=local", "train.micro_batch=8", "train.length=1024")
    roomy, tight = (predicted(f"hardware={name}", *words, "train.recompute=auto") for name in ("h200", "a100_sxm_40gb"))
    plain = predicted("hardware=h200", *words, "train.recompute=none")
    assert roomy.peak_bytes == plain.peak_bytes, "all of it fits"
    assert tight.peak_bytes < roomy.peak_bytes
    assert tight.fits


def test_a_run_recomputes_what_was_predicted() -> None:
    """`auto`, by one rule: at every size of memory the same blocks."""
    import torch

    from llmsys.train import checks

    words = ("hardware=a100_sxm_40gb", "model=llama2_13b", "method=lorafa", "engine=local", "train.micro_batch=8")
    found = set()
    for gib in (31, 33.5, 36, 38.5):
        given = config(*words, f"hardware.mem_gib={gib}", "train.length=1024", "train.recompute=auto")
        chosen = resolved(given, machines.of(given)).train.recompute
        assert chosen == checks.resolved(given, torch.device("cpu")).train.recompute
        found.add(chosen)
    assert len(found) == 4, "which the size decides"


def test_several_ranks_leave_less_of_a_gpu_than_one() -> None:
    alone, two = (predicted("hardware=a800", f"hardware.devices={n}", "techniques=F") for n in (1, 2))
    assert alone.capacity_bytes == int((1 - SLACK) * (79.25 - CONTEXT_GIB) * GIB)
    assert alone.capacity_bytes - two.capacity_bytes == pytest.approx((1 - SLACK) * NCCL_GIB * GIB, abs=1)
    text = tables.markdown(config("hardware=a800x8"), machines.of(config("hardware=a800x8")), two)
    assert f"{CONTEXT_GIB + NCCL_GIB:g} GiB that are used before there is a tensor" in text


def test_what_predicted_times_are_scored_by(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(BENCHMARKS)
    import bench_time

    rows = [
        {"predicted": [110.0, 55.0, 220.0], "rounds": [100.0, 50.0, 200.0], "alone": [110.0, 55.0, 220.0]},
        {"predicted": [45.0, 90.0, 45.0], "rounds": [50.0, 100.0, 50.0], "alone": [45.0, 90.0, 45.0]},
    ]
    found = bench_time.scores(rows)
    assert found["error_percent"] == pytest.approx(10), "the machine's own speed is in both sides of each round"
    assert found["worst_percent"] == pytest.approx(10)
    assert found["bias_percent"] == pytest.approx(0)
    assert found["spread_percent"] == pytest.approx(200)
    assert found["tau"] == 1
    assert found["alone_worst_percent"] > 60, "one calibration may be of a bad minute"


def test_a_false_fit_is_a_cell_that_some_memory_is_too_small_for(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(BENCHMARKS)
    import bench_memory

    def row(wanted: int, measured: int) -> dict[str, Any]:
        return {"predicted": {"peak": wanted}, "measured": {"peak": measured}}

    assert not bench_memory.false_fit(row(98, 100)), "the slack covers it"
    assert bench_memory.false_fit(row(90, 100))
    assert not bench_memory.false_fit(row(2000, 200)), "too careful is not wrong"


@pytest.mark.slow
def test_the_benchmarks_run_on_a_few_tiny_cells(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(BENCHMARKS)
    import bench_memory
    import bench_time

    memory = bench_memory.main(["--small", "--out", str(tmp_path)])
    assert memory.summary["measured"] == memory.summary["predicted_cells"] == 2
    assert memory.summary["peak_error_percent"] < 5
    assert memory.summary["static_error_percent"] < 2
    assert memory.summary["peer_cells"] >= 1
    times = bench_time.main(["--small", "--ranks", "1", "--out", str(tmp_path)])
    assert times.summary["cells"] == 3
    assert all(value > 0 for key in ("measured_ms", "predicted_ms") for value in times.samples[key])
