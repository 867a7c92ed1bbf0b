"""Claims about predictions: identities between their parts, what saves and costs what, and what is said of the rest."""

from __future__ import annotations

import dataclasses
import functools
import json
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from llmsys import compose, main, runner, schema
from llmsys.bench.predict import lines, scales, speeds, steps, tables
from llmsys.bench.predict import machine as machines
from llmsys.bench.predict.machine import Machine
from llmsys.bench.predict.prediction import Prediction, predict, resolved
from llmsys.bench.predict.speeds import Speeds
from llmsys.cost import case as cases
from llmsys.cost import flops, walk, work
from llmsys.cost.case import Case
from llmsys.cost.hardware import DEVICES
from llmsys.cost.links import Line
from llmsys.cost.room import CONTEXT_GIB, GIB, NCCL_GIB, SLACK
from llmsys.cost.work import AGAIN, FORWARD, Op

BENCHMARKS = str(Path(__file__).parents[2] / "benchmarks")
A800 = "hardware=a800x8"


@functools.cache
def config(*words: str) -> schema.Config:
    return schema.build(compose.compose(["+exp=bench_predict", *words]))


def predicted(*words: str, machine: Machine | None = None) -> Prediction:
    return predict(config(*words), machine)


def ideal(rate: float = 1e12, **changes: Any) -> Machine:
    """Arithmetic at one rate, everything else for nothing."""
    kinds = [f"{kind}/{precision}" for kind in work.ARITHMETIC for precision in ("bf16", "fp32")]
    curves = {**dict.fromkeys(kinds, ((1.0, rate),)), "stream": ((1.0, 1e30),)}
    values: dict[str, Any] = {
        "title": "ideal", "device": "cuda", "mem_gib": 80.0, "host_gib": None, "devices": 8,
        "speeds": Speeds(curves=curves, start_s={"forward": 0.0, "again": 0.0, "backward": 0.0}, behind=True),
        "lines": {"all": Line(0.0, 1e-30)}, "peak": {"bf16": rate, "fp32": rate},
        "copy_bytes_per_s": 1e30, "host_bytes_per_s": 1e30,
    }  # fmt: skip
    return Machine(**{**values, **changes})


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


@pytest.mark.parametrize(
    ("name", "gib"),
    [("a800x8", 512), ("rtx4090x8", 512), ("rtx3090x8", 128), ("rtx3090x8_pcie", 128), ("h100x8", None)],
)
def test_the_papers_machines_have_its_host_memory(name: str, gib: int | None) -> None:
    """Its table I; of others nobody knows what stands beside the cards."""
    found = machines.of(config(f"hardware={name}"))
    assert found.host_gib == gib
    assert any("host memory: not known" in note for note in found.notes) == (gib is None)


def test_money_is_rent_over_tokens() -> None:
    found = predicted("hardware=rtx4090x8", "techniques=F+R+Z3")
    assert found.usd_per_million_tokens == pytest.approx(8 * 0.34 / 3600 / found.tokens_per_s * 1e6)
    assert predicted("hardware=a800x8").usd_per_million_tokens is None, "no price is known"


def test_a_card_by_its_numbers_and_a_model_by_its_config(tmp_path: Path) -> None:
    shape = {"model_type": "llama", "vocab_size": 32000, "hidden_size": 4096, "intermediate_size": 11008,
             "num_hidden_layers": 32, "num_attention_heads": 32, "num_key_value_heads": 32,
             "max_position_embeddings": 4096}  # fmt: skip
    (tmp_path / "config.json").write_text(json.dumps(shape), encoding="utf-8")
    card = ("hardware=auto", "hardware.mem_gib=79.25", "hardware.tflops=312", "hardware.gbps=160", "hardware.devices=8")
    by_file = predicted(*card, f"model.config={tmp_path}")
    assert by_file.peak_bytes == predicted(A800).peak_bytes, "the same model"
    assert by_file.fits
    assert 0 < by_file.mfu < 1
    listed = predicted(A800).by_phase_ms["comm"]
    assert listed < by_file.by_phase_ms["comm"] < 1.5 * listed, "160 of NVLink's 200 GB/s count, later messages more"


@pytest.mark.parametrize(
    ("words", "line"),
    [
        (("hardware=auto",), "hardware.name=auto.*hardware.mem_gib=24"),
        ((A800, "engine=ddp", "train.world=16"), "train.world=16: hardware.devices=8.*=16 for one.*network=eth10g"),
        (("hardware=a800", "train.world=8"), "train.world=8: hardware.devices=1; type hardware.devices=8"),
        (("hardware=rtx2080ti", "engine=local"), "train.precision=bf16"),
        (("hardware=auto", "task.speeds=/nowhere"), "task.speeds=/nowhere: no record.json"),
    ],
)
def test_what_is_missing_is_named(words: tuple[str, ...], line: str) -> None:
    with pytest.raises(ValueError, match=line):
        predicted(*words)


def test_several_machines_talk_over_the_network() -> None:
    near = predicted(A800, "engine=zero3")
    far = predicted(A800, "engine=zero3", "train.world=16", "network=eth10g")
    assert far.by_phase_ms["comm"] > 10 * near.by_phase_ms["comm"]
    assert far.binds == "network"


def test_a_network_joins_machines_and_nothing_within_one() -> None:
    alone = predicted(A800, "engine=zero3")
    typed = predicted(A800, "engine=zero3", "network=eth1g")
    assert typed.by_phase_ms == alone.by_phase_ms
    assert "network=eth1g: not used" in typed.note
    assert "eth10g between machines" in predicted("hardware=a800", "train.world=2", "network=eth10g").note


def test_bridges_take_every_second_hop_off_the_host() -> None:
    """Of GeForce cards, whose traffic goes through it; as fast as two cards alone at most. The paper has 10 % more
    scaling efficiency by the bridges of its RTX 3090s."""
    names, words = ("rtx3090x8", "rtx3090x8_pcie", "rtx4090x8"), ("techniques=F+R+Z2", "model.num_layers=8")
    bridged, plain, ada = (machines.of(config(f"hardware={name}", *words)).lines["all"] for name in names)
    gain = plain.beta_s / bridged.beta_s
    assert gain == pytest.approx(min(2 * lines.EIGHT_SHARE, lines.LINK["host"]) / lines.EIGHT_SHARE)
    assert 1 < gain <= 2, "half as many flows"
    assert ada == plain, "the same PCIe, and no bridges"
    pair = machines.of(config("hardware=rtx3090x8", "train.world=2")).lines["all"]
    assert 1e-9 / pair.beta_s == pytest.approx(0.8 * 56.25), "all of the ring over a bridge"
    four = [config(f"hardware={name}", "train.world=4") for name in names]
    assert machines.of(four[0]).lines == machines.of(four[1]).lines, "so few flows do not limit each other"
    spent = [predicted(f"hardware={name}", *words) for name in names[:2]]
    assert spent[0].by_phase_ms["comm"] < spent[1].by_phase_ms["comm"]
    assert "bridges take 4 of the ring's 8 hops" in spent[0].note
    a100 = [
        machines.of(config("hardware=a100_pcie", "hardware.devices=8", *how)).lines
        for how in ((), ("hardware.nvlink=false",))
    ]
    assert a100[0] == a100[1], "cards that read each other are limited by their slots"


def test_a_rate_goes_through_its_points_straight_in_logarithms() -> None:
    curve = ((1e4, 1.0), (1e6, 100.0))
    assert [speeds.at(curve, size) for size in (1e4, 1e6)] == pytest.approx([1.0, 100.0])
    assert speeds.at(curve, 1e5) == pytest.approx(10.0)
    assert (speeds.at(curve, 1.0), speeds.at(curve, 1e9)) == pytest.approx((1.0, 100.0)), "and stays beyond them"


@pytest.mark.parametrize("name", sorted(DEVICES))
def test_a_launch_on_a_listed_device_has_one_tail_however_many_matrices_it_multiplies(name: str) -> None:
    """Eager attention multiplies B H matrices in one kernel. Of every kind: work over rate, and a tail for a launch."""
    given = speeds.listed(DEVICES[name])
    widths = {2: "bf16", 4: "fp32"}
    arithmetic = [
        (kind, width) for kind in work.ARITHMETIC for width in widths if f"{kind}/{widths[width]}" in given.curves
    ]
    for kind, width in arithmetic:
        for launches, matrices in ((1, 1), (1, 256), (3, 256)):
            op = Op(FORWARD, kind, 1e7 * launches * matrices, 0.0, launches, matrices, width)
            bound = (
                op.flops / max(rate for _, rate in given.curves[f"{kind}/{widths[width]}"]) + launches * speeds.TAIL_S
            )
            assert given.seconds(op) == pytest.approx(bound, rel=1e-6)
    for kind in ("stream", "exp", "dequant", "adam"):
        op = Op(FORWARD, kind, 0.0, 1e6, 5)
        assert given.seconds(op) == pytest.approx(1e6 / given.rate(kind, 1e6) + 5 * speeds.KERNEL_S, rel=1e-6)


def test_measured_batches_go_by_the_size_of_a_matrix() -> None:
    """As the probes time them: the curve has the time of small matrices in it, and nothing is added to it."""
    curves = {"batched/fp32": ((1e4, 1e9), (1e6, 1e10)), "stream": ((1.0, 1e30),)}
    given = Speeds(curves=curves, start_s=speeds.START_S, behind=False)
    assert given.seconds(Op(FORWARD, "batched", 64e6, 0.0, 1, 64)) == pytest.approx(64e6 / 1e10)


def test_eager_attention_of_a_small_batch_is_a_part_of_its_step() -> None:
    """LLaMA-2 7B at 350 tokens: 0.2 of 15 TFLOPs are the scores' and the context's."""
    given = config(A800)
    machine = machines.of(given)
    case = Case(given.model, given.train, given.method, given.engine, **cases.facts(given, "cuda"))
    batched = [op for ops in walk.run(case).ops.values() for op in ops if op.kind == "batched"]
    whole = predict(given, machine)
    assert sum(map(machine.speeds.seconds, batched)) < 0.06e-3 * whole.step_ms


@pytest.mark.parametrize(
    ("words", "skips"),
    [
        (("model=llama2_7b",), True),
        (("model=gpt2",), True),
        (("model=llama2_7b", "data=code_docstrings"), False),  # rows of different lengths: with a mask
        (("model=llama2_7b", "data=code_docstrings", "model.attention=flash_attention_2"), True),  # which reads lengths
        (("model=bert_base", "data=glue_sst2"), False),
        (("model=t5_base", "data=code_docstrings"), False),
    ],
)
def test_only_a_causal_kernel_skips_what_comes_later(words: tuple[str, ...], skips: bool) -> None:
    given = config(A800, "techniques=F", *words)
    case = Case(given.model, given.train, given.method, given.engine, **cases.facts(given, "cuda"))
    found = [op for ops in walk.run(case).ops.values() for op in ops if "attention" in op.kind]
    assert {op.kind for op in found} == {("" if skips else "whole_") + f"attention{way}" for way in ("", "_backward")}
    known = machines.of(given).speeds
    seconds = [op.flops / known.rate(kind, op.size, op.width) for op in found for kind in (op.kind, "attention")]
    ratio = 1.0 if skips else speeds.CAUSAL
    assert seconds[0] / seconds[1] == pytest.approx(ratio)


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
    wild = [scales.Seen(1.0, 0.1, 1.0), scales.Seen(0.1, 0.1, 1.0)]
    found = scales.factors(wild, behind=False)
    assert found.work == found.start
    assert re.search(r"for work and .* for starts are out of 0.2 to 5; .* for both", found.why)
    one_sided = scales.factors([scales.Seen(1.0, 0.1, 1.2), scales.Seen(0.5, 0.1, 0.6)], behind=True)
    assert one_sided == (pytest.approx(1.2), pytest.approx(1.2), one_sided.why)
    assert "same side" in one_sided.why
    sane = [scales.Seen(work, start, 1.5 * work + 3 * start) for work, start in ((1.0, 0.2), (0.05, 0.1))]
    assert not scales.factors(sane, behind=False).why


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


ROOT = Path(__file__).parents[2]
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


def test_what_nobody_gave_of_a_card_is_said() -> None:
    words = ("hardware=auto", "hardware.mem_gib=48", "hardware.tflops=180", "hardware.devices=2")
    bare = predicted(*words).note
    for line in (
        "hardware.mem_gbps: not given; 1200 GB/s",
        "hardware.host_gbps: not given",
        "hardware.gbps: not given",
    ):
        assert line in bare
    assert "hardware.tflops=180: taken as the peak in every precision" in bare
    assert "assumed (llmsys.cost.hardware)" in bare, "the share that large products reach"
    given = predicted(*words, "hardware.mem_gbps=900", "hardware.host_gbps=25", "hardware.gbps=25").note
    assert "not given" not in given
    assert "not given" not in predicted(A800).note
    eighths = predicted(A800, "techniques=Q8").note
    assert "product/fp8: no speed of it is known; predicted at that of product/bf16" in eighths


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
        {"predicted": 110.0, "measured": 100.0, "rounds": [90.0, 99.0]},
        {"predicted": 45.0, "measured": 50.0, "rounds": [40.0, 48.0]},
    ]
    assert bench_time.scores(rows)["error_percent"] == pytest.approx(10)
    assert bench_time.scores(rows)["bias_percent"] == pytest.approx(0)
    assert bench_time.scores(rows)["spread_percent"] == pytest.approx(15)
    assert bench_time.scores(rows)["tau"] == 1


def test_published_rows_are_runs_of_ours(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    """MPT has GPT-2's parameters, to the last one, and its step the batch and the ranks of the row."""
    monkeypatch.syspath_prepend(BENCHMARKS)
    import bench_published_time

    for row in bench_published_time.ROWS:
        given = bench_published_time.config(row)
        case = Case(given.model, given.train, given.method, given.engine, **cases.facts(given, "cuda"))
        assert steps.Sizes.of(case).numel == row.params, row
        assert schema.accumulation(given.train, given.engine) == row.accumulation
        assert given.train.world == 8
    found = bench_published_time.main([row for row in bench_published_time.ROWS if row.model == "760m"])
    assert list(found) == [*bench_published_time.CARDS, "all"]
    assert "| all | 3 |" in capsys.readouterr().out
    scored = bench_published_time.scores([(110.0, 100.0), (40.0, 50.0)])
    assert scored["error_percent"] == pytest.approx(15)
    assert scored["bias_percent"] == pytest.approx(-5)
    assert (scored["worst_percent"], scored["tau"]) == (pytest.approx(20), 1)


def test_a_false_fit_is_one_that_was_predicted_and_did_not_hold(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(BENCHMARKS)
    import bench_memory

    def row(wanted: int, measured: int) -> dict[str, Any]:
        return {"predicted": {"peak": wanted}, "measured": {"peak": measured}}

    exact = [row(100, 100), row(1000, 1000), row(10_000, 10_000)]
    wrong, fit = bench_memory.false_fits(exact)
    assert wrong == 0 < fit
    wrong, _ = bench_memory.false_fits([*exact, row(200, 2000)])
    assert wrong > 0, "fits 1000 by its prediction, and would have needed 2000"
    assert bench_memory.false_fits([*exact, row(2000, 200)])[0] == 0, "too careful is not wrong"


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
