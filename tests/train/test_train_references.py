"""The two classifiers that fine-tuning has to beat, and the scores they share with it."""

from __future__ import annotations

import math
from collections import Counter
from pathlib import Path

import pytest
import torch
import train_harness as harness

from llmsys import data, models
from llmsys.data import tokenizer
from llmsys.train import references
from llmsys.train.evaluate import scores


def test_majority_is_the_share_of_the_most_frequent_class(tmp_path: Path) -> None:
    config = harness.config("majority", "bert")
    source = data.open(config.data)
    label = Counter(example.label for example in source.train).most_common(1)[0][0]
    share = sum(example.label == label for example in source.val) / len(source.val)
    result = harness.run(tmp_path, config)
    assert result["summary"]["accuracy"] == share
    assert result["summary"]["trainable_params"] == 0
    assert result["data_hash"] == source.hash


def test_probe_trains_the_head_alone_and_is_deterministic(tmp_path: Path) -> None:
    """D x C weights and C biases; no optimizer state, no saved tensors, so memory is the weights'. No learning rate."""
    config = harness.config("probe", "bert", train__lr_by_method={})
    first, second = (harness.run(tmp_path / name, config)["summary"] for name in "ab")
    assert first == second
    assert first["trainable_params"] == 64 * 3 + 3
    assert first["accounted_bytes"] == first["weights_bytes"]
    assert 0 < first["macro_f1"] <= 1


def test_features_come_in_the_order_of_the_examples(tmp_path: Path) -> None:
    """They are computed sorted by length; labels and modules are matched to them by place."""
    config = harness.config("probe", "bert")
    source = data.open(config.data)
    dataset = data.encode(source, tokenizer.load("bytes", None), config.train, config.model)
    model = models.load(
        config.model, objective="classification", num_labels=3, device=torch.device("cpu"), seed=0, folder=None
    )
    x, y = references.features(config, harness.context(tmp_path, config), model, dataset.train)
    assert y.tolist() == [example.label for example in source.train]
    first = dataset.train.batch([0], pad_to=None)
    with torch.no_grad():
        alone = model.features(first["input_ids"], first["attention_mask"])
    assert x[0] == pytest.approx(alone[0].numpy(), abs=1e-5)


@pytest.mark.parametrize("kind", ["majority", "probe"])
def test_references_are_for_classification(kind: str) -> None:
    with pytest.raises(ValueError, match=f"method.kind={kind}: is for classification"):
        harness.config(kind)


def test_scores_against_a_hand_count() -> None:
    """Classes 0 and 1: F1 = 2/3 and 4/5; accuracy 3/4, SE sqrt(3/16 / 4)."""
    result = scores([0, 0, 1, 1], [0, 1, 1, 1])
    assert result["accuracy"] == 0.75
    assert result["accuracy_se"] == pytest.approx(math.sqrt(0.75 * 0.25 / 4))
    assert result["macro_f1"] == pytest.approx((2 / 3 + 4 / 5) / 2)
