"""What the loop promises of its results."""

from __future__ import annotations

import json
import math
from pathlib import Path

import pytest
import torch
import train_harness as harness

from llmsys import data, models, wiring
from llmsys.data import tokenizer
from llmsys.errors import NotANumber
from llmsys.train import optimizer
from llmsys.train.loop import Loop
from llmsys.train.reproducible import reproducible


def test_same_config_gives_the_same_bits(tmp_path: Path) -> None:
    """Determinism is what resuming, and comparing two methods, rests on; dropout makes the random stream matter."""
    config = harness.config("lora_peft", method__dropout=0.1)
    harness.run(tmp_path / "a", config)
    harness.run(tmp_path / "b", config)
    assert harness.curve(tmp_path / "a") == harness.curve(tmp_path / "b")
    files = [(tmp_path / name / "weights/adapter_model.safetensors").read_bytes() for name in "ab"]
    assert files[0] == files[1]


def test_the_micro_batch_does_not_change_the_result(tmp_path: Path) -> None:
    """Rows of very different length: only weighting by label tokens makes 8x1, 2x4 and 1x8 the same mean."""
    rows = [{"instruction": "say it", "input": "", "output": "ab " * (1 + 7 * (i % 4))} for i in range(64)]
    path = tmp_path / "pairs.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    curves = []
    for micro in (1, 4, 8):
        out = tmp_path / str(micro)
        config = harness.config(data__kind="synthetic", train__micro_batch=micro, train__length=96)
        config.data.kind, config.data.path = "jsonl", str(path)
        harness.run(out, config)
        curves.append([value for row in harness.curve(out) for value in row.values()])
    assert curves[1] == pytest.approx(curves[0], rel=1e-5)
    assert curves[2] == pytest.approx(curves[0], rel=1e-5)


def test_loss_falls(tmp_path: Path) -> None:
    """The synthetic text is a Markov chain, so there is something to learn beyond the uniform ln(V)."""
    config = harness.config(train__steps=60, train__lr_scale=5.0, train__length=64)
    harness.run(tmp_path, config)
    losses = [row["loss"] for row in harness.curve(tmp_path) if "loss" in row]
    assert losses[0] == pytest.approx(math.log(320), abs=0.3)
    assert losses[-1] < losses[0] - 1.5


def test_nan_stops_the_run_naming_the_step(tmp_path: Path) -> None:
    """A step at an absurd rate makes the next loss infinite: nothing of it may be saved."""
    with pytest.raises(NotANumber, match="step 2: "):
        harness.run(tmp_path, harness.config(train__lr_scale=1e38))
    assert [row["step"] for row in harness.curve(tmp_path)] == [1]
    assert not (tmp_path / "weights").exists()


@pytest.mark.parametrize("family", ["llama", "bert"])
@pytest.mark.parametrize("kind", ["full", "lora_peft", "lorafa_peft"])
def test_only_the_right_parameters_move(tmp_path: Path, kind: str, family: str) -> None:
    """Base frozen under adapters, A frozen (bit for bit) under LoRA-FA, the new head always trained."""
    config = harness.config(kind, family)
    context = harness.context(tmp_path, config)
    with reproducible(0, 1, True):
        source = data.open(config.data)
        dataset = data.encode(source, tokenizer.load("bytes", None), config.train, config.model)
        model = models.load(
            config.model,
            objective=source.objective,
            num_labels=len(source.labels),
            device=context.device,
            seed=0,
            folder=None,
        )
        model = context.method.prepare(model)
        before = {name: p.detach().clone() for name, p in model.named_parameters()}
        Loop(config, context, model, dataset, 1e-2).run()
    moved = {name for name, p in model.named_parameters() if not torch.equal(p, before[name])}
    if kind == "full":
        # An embedding whose token or position never comes up has no gradient, but its tensor has.
        assert moved == set(before)
        return
    trained = ("lora_B",) if kind == "lorafa_peft" else ("lora_A", "lora_B")
    wanted = {name for name in before if any(part in name for part in trained) or name.startswith("classifier.")}
    assert moved == wanted
    assert len([name for name in moved if "lora_B" in name]) == 2 * (7 if family == "llama" else 6)


def test_lorafa_saves_fewer_bytes_than_lora(tmp_path: Path) -> None:
    """The paper's point: with A frozen the full-rank input of an adapted layer is not stored."""
    kinds = ("full", "lora_peft", "lorafa_peft")
    full, lora, lorafa = (harness.run(tmp_path / k, harness.config(k))["summary"] for k in kinds)
    assert lorafa["saved_bytes"] < lora["saved_bytes"] < full["saved_bytes"]
    assert lorafa["accounted_bytes"] < lora["accounted_bytes"] < full["accounted_bytes"]


def test_recomputation_keeps_less_and_computes_the_same(tmp_path: Path) -> None:
    plain = harness.run(tmp_path / "plain", harness.config())["summary"]
    block = harness.run(tmp_path / "block", harness.config(train__recompute="block"))["summary"]
    assert harness.curve(tmp_path / "plain") == harness.curve(tmp_path / "block")
    inputs = 2 * 8 * 32 * 64 * 4  # two blocks, each keeping its input [8, 32, 64] in fp32
    assert inputs < block["saved_bytes"] < plain["saved_bytes"] / 3


@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
def test_bf16_trains(tmp_path: Path, dtype: str) -> None:
    """Autocast over fp32 weights, and everything in bf16, start from the loss that fp32 starts from."""
    config = harness.config("lora_peft", train__precision="bf16")
    config.model.dtype = dtype
    summary = harness.run(tmp_path, config)["summary"]
    assert harness.curve(tmp_path)[0]["loss"] == pytest.approx(math.log(320), abs=0.3)
    assert summary["weights_bytes"] < (400_000 if dtype == "bf16" else 700_000)


def test_the_record_has_what_tables_need(tmp_path: Path) -> None:
    result = harness.run(tmp_path, harness.config("lorafa_peft", "bert", train__checkpoint_every=2))
    summary, samples = result["summary"], result["samples"]
    for key in ("accuracy", "accuracy_se", "macro_f1", "loss", "val_loss", "tokens_per_s", "samples_per_s"):
        assert math.isfinite(summary[key]), key
    parts = [summary[f"{part}_bytes"] for part in ("weights", "gradients", "optimizer", "saved")]
    assert summary["accounted_bytes"] == sum(parts)
    assert summary["predicted_peak_gib"] > 0
    assert summary["predicted_step_ms"] > 0
    spans = {"step_ms", "data_ms", "forward_ms", "backward_ms", "optimizer_ms"}
    assert set(samples) == spans
    assert {len(values) for values in samples.values()} == {5}, "six steps, one of them warm-up"
    assert result["kernel"].startswith("sdpa")
    assert result["resumed_from_step"] is None
    assert (tmp_path / result["files"]["weights"] / "weights.json").is_file()
    assert not (tmp_path / "checkpoint").exists(), "of no use after success"


def test_weight_decay_spares_vectors() -> None:
    config = harness.config(train__weight_decay=0.1)
    model = torch.nn.Sequential(torch.nn.Linear(4, 4), torch.nn.LayerNorm(4))
    groups = optimizer.adamw(model, config.train, 1e-3).param_groups
    assert [(group["weight_decay"], len(group["params"])) for group in groups] == [(0.1, 1), (0.0, 3)]


def test_a_full_run_s_weights_start_another(tmp_path: Path) -> None:
    """`model.weights=<folder>` of what was saved: its first loss is where the first run ended."""
    first = harness.run(tmp_path / "a", harness.config(train__steps=20))["summary"]
    config = harness.config(train__lr_scale=0.0, model__weights=str(tmp_path / "a/weights"))
    again = harness.run(tmp_path / "b", config)["summary"]
    assert again["val_loss"] == first["val_loss"]


def test_wiring_knows_every_method() -> None:
    for kind in ("full", "lora_peft", "lorafa_peft", "majority", "probe"):
        assert callable(wiring.method(harness.config(kind, "bert").method).prepare)
