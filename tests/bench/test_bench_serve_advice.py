"""Claims about advice on serving: it keeps the limits that it was given, its memory is the model's, and what it writes
means what it says."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from subprocess import CompletedProcess

import pytest
import torch
from serve_harness import passes_recorded

from llmsys import compose, models, schema
from llmsys.bench.serve import advice, work


def asked(*words: str) -> schema.Config:
    return schema.build(compose.compose(["+exp=bench_advise", "goal=serve", *words]))


def test_weights_are_those_of_the_built_model() -> None:
    cfg = schema.build(compose.compose(["model=llama_6m"])).model
    assert isinstance(cfg, schema.Transformer)
    made = models.load(cfg, objective="causal_lm", num_labels=0, device=torch.device("cpu"), seed=0, folder=None)
    held = sum(p.numel() * 4 for p in made.parameters())
    assert work.weight_bytes(cfg) == held


def test_every_choice_fits_and_keeps_what_was_asked_for() -> None:
    config = asked("hardware=auto", "slo_ttft_ms=300", "slo_tpot_ms=30")
    found = advice.answer(config)
    assert len(found.ranking) > 10
    for each in found.ranking:
        assert each.ttft_ms <= 300
        assert each.tpot_ms <= 30
    speeds = [each.tokens_per_s / each.cards for each in found.ranking]
    assert speeds == sorted(speeds, reverse=True)


def test_a_decoding_step_of_one_request_reads_the_weights_at_the_memorys_speed() -> None:
    """A 7B model in bf16: 13.5 GB over 0.8 of an A800's 2,039 GB/s, as by hand."""
    config = asked("hardware=a800x8", "task.prompt_tokens=1", "task.output_tokens=2")
    (one,) = [each for each in advice.answer(config).ranking if (each.cards, each.quant) == (1, "none")]
    assert one.memory_gib > 12.5
    device = advice.DEVICES["a800"]
    assert isinstance(config.model, schema.Transformer)
    own = advice.Timed(advice.on_roofline(config.model, device), device, 1, 1, 2)
    assert own.decode_s(1) * 1e3 == pytest.approx(13.2e9 / (2039e9 * 0.8) * 1e3, rel=0.05)


def test_a_tighter_limit_never_serves_more() -> None:
    for card in ("a800x8", "rtx4090x8"):
        speeds = []
        for limit in (0, 100, 50, 25):
            ranking = advice.answer(asked(f"hardware={card}", f"slo_tpot_ms={limit}")).ranking
            speeds.append(max((each.tokens_per_s for each in ranking), default=0.0))
        assert speeds == sorted(speeds, reverse=True)


def test_what_does_not_fit_is_left_out_with_the_reason() -> None:
    found = advice.answer(asked("model=llama2_70b", "hardware=rtx4090x8"))
    reasons = dict(found.left_out)
    assert "GiB of a card that has 23.6" in reasons["1 x rtx4090"]
    assert any(each.cards == 8 and each.quant == "nf4" for each in found.ranking)


def test_the_command_answers_and_writes_the_line_of_vllm(
    llmsys: Callable[..., CompletedProcess[str]], results: Path, tmp_path: Path
) -> None:
    done = llmsys("+exp=bench_advise", "goal=serve", "hardware=a800x8", "slo_tpot_ms=50", f"emit={tmp_path / 'run'}")
    assert done.returncode == 0, done.stderr
    assert "Which hardware serves llama2_7b" in done.stdout
    (path,) = results.glob("*/*/advice.json")
    best = json.loads(path.read_text())["ranking"][0]
    line = (tmp_path / "run" / "vllm_serve.sh").read_text()
    assert f"--max-num-seqs {best['batch']} --max-model-len 768" in line
    assert ("--tensor-parallel-size" in line) == (best["cards"] > 1)
    assert ("--quantization bitsandbytes" in line) == (best["quant"] == "nf4")


TINY = ("hardware=auto", "model=llama_tiny", "model.dtype=fp32", "task.prompt_tokens=8", "task.output_tokens=4")


def tiny(*words: str) -> schema.Config:
    return asked(*TINY, *words)


def test_a_machine_that_was_measured_is_asked_about_alone_by_its_own_passes(tmp_path: Path) -> None:
    """Of one request at a time by hand: a prefill of 8 tokens takes 2 ms, a step with 10 cached 1 ms and a bit."""
    path = passes_recorded(tmp_path)
    (one,) = advice.answer(tiny(), path).ranking
    assert (one.title, one.card, one.cards, one.batch, one.binds) == ("a machine", advice.HERE, 1, 4, "measured")
    (alone,) = advice.answer(tiny("slo_ttft_ms=3"), path).ranking
    assert (alone.batch, alone.binds) == (1, "ttft")
    assert alone.ttft_ms == pytest.approx(2.0)
    assert 1.0 < alone.tpot_ms < 1.1
    assert alone.tokens_per_s == pytest.approx(4 / (alone.ttft_ms + 4 * alone.tpot_ms) * 1e3)


def test_a_machine_that_was_measured_and_is_too_slow_or_small_serves_nothing(tmp_path: Path) -> None:
    for words, why in (
        ("slo_tpot_ms=0.9", "a token alone takes 1.0 ms"),
        ("hardware.mem_gib=0.00001", "one request needs"),
    ):
        found = advice.answer(tiny(words), passes_recorded(tmp_path))
        assert not found.ranking
        assert found.left_out[0][0] == "1 x a machine"
        assert why in found.left_out[0][1]


def test_the_command_asks_for_a_run_of_passes(
    llmsys: Callable[..., CompletedProcess[str]], results: Path, tmp_path: Path
) -> None:
    words = ("+exp=bench_advise", "goal=serve", *TINY)
    done = llmsys(*words, f"task.speeds={passes_recorded(tmp_path)}")
    assert done.returncode == 0, done.stderr
    assert "on 1 x a machine" in done.stdout
    assert "No more were measured at a time" in done.stdout
    done = llmsys(*words, f"task.speeds={tmp_path / 'nothing'}")
    assert done.returncode
    assert "no record.json there; it is a run of bench_serve_modules" in done.stderr
    done = llmsys(*words, "hardware=a800x8", f"task.speeds={tmp_path}")
    assert done.returncode
    assert "is another machine, the one that was measured" in done.stderr
