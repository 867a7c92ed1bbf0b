"""`train.loss=chunked` trains, evaluates and resumes as the whole loss does."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import pytest
import train_harness as harness

from llmsys import schema
from llmsys.errors import Interrupted


def values(out: Path) -> list[Any]:
    return [value for row in harness.curve(out) for value in row.values()]


@pytest.mark.parametrize("kind", ["full", "lora_peft", "lorafa_peft"])
def test_training_and_evaluation_are_those_of_the_whole_loss(tmp_path: Path, kind: str) -> None:
    """Every number of every row, to the rounding of fp32; saved bytes are what the record predicts less the logits."""
    whole, chunked = (harness.config(kind, train__eval_every=3, train__loss=loss) for loss in ("whole", "chunked"))
    before, after = harness.run(tmp_path / "whole", whole), harness.run(tmp_path / "chunked", chunked)
    assert values(tmp_path / "chunked") == pytest.approx(values(tmp_path / "whole"), rel=1e-5)
    assert after["summary"]["saved_bytes"] < before["summary"]["saved_bytes"]
    assert after["kernel"] == before["kernel"]


@pytest.mark.parametrize("family", ["gpt2", "t5"])
def test_other_families_too(tmp_path: Path, family: str) -> None:
    """A tied table, and an encoder-decoder that writes while it is evaluated, which takes logits as before."""
    for loss in ("whole", "chunked"):
        config = harness.config(train__loss=loss, train__steps=2, train__generate_max=2, train__target_length=24)
        model = schema.Transformer(family=family, tie_embeddings=True)
        docstrings = schema.Data(kind="code_docstrings", max_train=32, max_val=8)
        config = dataclasses.replace(config, model=model, data=docstrings if family == "t5" else config.data)
        harness.run(tmp_path / loss, config)
    assert values(tmp_path / "chunked") == pytest.approx(values(tmp_path / "whole"), rel=1e-5)


def test_micro_batches_without_a_label_count_nothing(tmp_path: Path) -> None:
    """Prompts that fill the whole length, a micro-batch of their own: a loss of 0 with gradients of 0, no logits."""
    rows = [{"instruction": "x" * (200 if i % 2 else 2), "input": "", "output": "abc"} for i in range(48)]
    path = tmp_path / "pairs.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    for loss in ("whole", "chunked"):
        config = harness.config(train__micro_batch=1, train__length=96, train__steps=2, train__loss=loss)
        config.data.kind, config.data.path = "jsonl", str(path)
        harness.run(tmp_path / loss, config)
    assert values(tmp_path / "chunked") == pytest.approx(values(tmp_path / "whole"), rel=1e-5)


def test_a_stopped_run_goes_on_with_the_same_bits(tmp_path: Path) -> None:
    config = harness.config(train__loss="chunked", train__checkpoint_every=2, model__dropout=0.1)
    harness.run(tmp_path / "whole", config)
    context = harness.context(tmp_path / "cut", config)

    def stop(progress: dict[str, Any]) -> None:
        context.stop_asked = progress.get("step") == 3

    context.listener = stop
    with pytest.raises(Interrupted):
        harness.train(config, context)
    assert harness.run(tmp_path / "cut", config)["resumed_from_step"] in (3, 4)
    assert harness.curve(tmp_path / "cut") == harness.curve(tmp_path / "whole")


@pytest.mark.parametrize(
    ("wrong", "words"),
    [
        ({"train__loss": "fused"}, "train.loss=fused: must be one of whole, chunked"),
        ({"train__loss": "chunked", "family": "bert"}, "train.loss=chunked: is for a head over a vocabulary"),
        ({"train__loss": "chunked", "engine": schema.Engine(kind="tp")}, "train.loss=chunked: .*engine=tp.*=whole"),
    ],
)
def test_where_it_cannot_be_one_line_says_so(wrong: dict[str, Any], words: str) -> None:
    with pytest.raises(ValueError, match=words):
        harness.config(**wrong)
