"""Claims about machines that are not at hand: how long operators take there, what joins ranks, and what is assumed."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path

import pytest
from predict_harness import A800, BENCHMARKS, config, ideal, predicted

from llmsys import schema
from llmsys.bench.predict import lines, speeds, steps
from llmsys.bench.predict import machine as machines
from llmsys.bench.predict.prediction import predict
from llmsys.bench.predict.speeds import Speeds
from llmsys.cost import case as cases
from llmsys.cost import walk, work
from llmsys.cost.case import Case
from llmsys.cost.hardware import DEVICES
from llmsys.cost.work import BACKWARD, FORWARD, Op


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


def test_a_cpu_pays_for_a_products_bytes_too_and_a_gpu_for_the_longer_one() -> None:
    """Measured are products of operands in the cache; those of a step come from memory."""
    curves = {"product/fp32": ((1.0, 1e10),), "stream": ((1.0, 1e9),)}
    op = Op(FORWARD, "product", 3e9, 1e8, 1, 1)
    for behind, seconds in ((False, 0.3 + 0.1), (True, 0.3)):
        assert Speeds(curves=curves, start_s=speeds.START_S, behind=behind).seconds(op) == pytest.approx(seconds)


def test_moments_in_8_bits_go_at_the_speed_of_their_own_kernel() -> None:
    """On a CPU it is slower than AdamW's for all its fewer bytes, and O8 costs a small batch a third of its speed."""
    curves = {**ideal().speeds.curves, "adam": ((1.0, 1e12),), "adam8": ((1.0, 1e9),)}
    machine = ideal(speeds=dataclasses.replace(ideal().speeds, curves=curves))
    words = ("model=llama_6m", "hardware=a800x8", "train.world=1", "train.global_batch=1")
    plain, eight = (predicted(*words, each, machine=machine) for each in ("techniques=Naive", "techniques=O8"))
    update = 10 * 5.7e6 / 1e9  # bytes an element: moments 4, weights and gradients in bf16 6
    assert eight.by_phase_ms["optimizer"] == pytest.approx(1e3 * update, rel=0.05)
    assert plain.by_phase_ms["optimizer"] < 0.1 * eight.by_phase_ms["optimizer"]


def test_measured_batches_go_by_the_size_of_a_matrix() -> None:
    """As the probes time them: the curve has the time of small matrices in it, and nothing is added to it."""
    curves = {"batched/fp32": ((1e4, 1e9), (1e6, 1e10)), "stream": ((1.0, 1e30),)}
    given = Speeds(curves=curves, start_s=speeds.START_S, behind=False)
    assert given.seconds(Op(FORWARD, "batched", 64e6, 0.0, 1, 64)) == pytest.approx(64e6 / 1e10)


def test_engines_lay_gradients_and_weights_flat_for_messages() -> None:
    """Bytes by hand, at 1 byte/s and nothing else: DeepSpeed moves a gradient three times, and once what it takes out;
    what is gathered is copied out. Stage 1 waits for the last micro-batch."""
    slow = ideal(speeds=dataclasses.replace(ideal().speeds, curves={**ideal().speeds.curves, "stream": ((1.0, 1.0),)}))
    sizes = ("model=llama2_7b", "train.world=8", "train.micro_batch=1", "train.global_batch=16")
    found = {}
    for words in (("techniques=Z1",), ("techniques=Z2",), ("techniques=Z3",), ("techniques=Z3", "engine=fsdp2")):
        given = config(A800, *sizes, *words)
        case = Case(given.model, given.train, given.method, given.engine, **cases.facts(given, "cuda"))
        size = steps.Sizes.of(case)
        around = steps._around(case, size, 2, slow)
        found[words[-1]] = tuple(around[name].memory / size.trained_nbytes for name in (FORWARD, BACKWARD))
    own = 2 / 8
    assert found["techniques=Z1"] == pytest.approx((0, 6 + own))
    assert found["techniques=Z2"] == pytest.approx((0, 2 * (6 + own)))
    assert found["techniques=Z3"] == pytest.approx((4, 2 * (6 + own + 2)))
    assert found["engine=fsdp2"] == pytest.approx((4, 2 * (2 + 2)))


def test_engines_that_gather_weights_wait_for_their_own_python() -> None:
    """Of small blocks a pass waits for its host, with hooks around each weight; of large ones the device hides them."""
    start_s = dict.fromkeys((FORWARD, work.AGAIN, BACKWARD), 1e-5)
    deep = ("model.num_layers=24", "train.world=2", "train.global_batch=2", "train.micro_batch=1", "train.length=350")

    def forward(*words: str, rate: float) -> float:
        machine = ideal(rate, speeds=dataclasses.replace(ideal(rate).speeds, start_s=start_s))
        return predicted(A800, "model=llama_tiny", *deep, *words, machine=machine).by_phase_ms["forward"]

    weights = 9 * 24 + 3
    for words, starts in ((("techniques=Z3",), 21), (("techniques=Z3", "engine=fsdp2"), 12)):
        waited = forward(*words, rate=1e15) - forward("techniques=Z2", rate=1e15)
        assert waited == pytest.approx(starts * weights * 1e-2, rel=0.05), "ms of the host"
        assert forward(*words, rate=1e9) == pytest.approx(forward("techniques=Z2", rate=1e9), rel=1e-3)


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


@pytest.mark.parametrize(
    ("name", "gib"),
    [("a800x8", 512), ("rtx4090x8", 512), ("rtx3090x8", 128), ("rtx3090x8_pcie", 128), ("h100x8", None)],
)
def test_the_papers_machines_have_its_host_memory(name: str, gib: int | None) -> None:
    """Its table I; of others nobody knows what stands beside the cards."""
    found = machines.of(config(f"hardware={name}"))
    assert found.host_gib == gib
    assert any("host memory: not known" in note for note in found.notes) == (gib is None)


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
