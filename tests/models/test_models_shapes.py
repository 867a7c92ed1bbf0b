"""Published shapes: what is counted, and that each file in `conf/model` says its own count."""

from __future__ import annotations

import re

import pytest
import torch
from families_harness import CONF, EVERY, read

from llmsys import schema
from llmsys.models import blocks, skeleton

COUNTED = {
    "bert_base": 110_106_428,
    "bert_large": 336_226_108,
    "roberta_base": 124_645_632,
    "roberta_large": 355_359_744,
    "gpt2": 124_439_808,
    "t5_small": 60_506_624,
    "t5_base": 222_903_552,
    "t5_large": 737_668_096,
    "resnet50": 25_557_032,
    "resnet152": 60_192_808,
    "resnet18_cifar": 11_173_962,
    "vgg16_cifar": 14_728_266,
}


def count(name: str) -> int:
    """As the papers count: BERT with its two pre-training heads (the decoder is the embedding's table); RoBERTa's
    encoder and the dense layer of its head, which is as large as a pooler; tied tables once; ResNet and VGG with the
    head of `num_classes`; the others whole."""
    cfg = read(name)
    model = skeleton(cfg, head="pretraining" if cfg.family == "bert" else "task")
    assert {value.device.type for value in model.parameters()} == {"meta"}
    left_out = "classifier.out_proj." if cfg.family == "roberta" else "nothing"
    return sum(value.numel() for key, value in model.named_parameters() if not key.startswith(left_out))


@pytest.mark.parametrize("name", COUNTED)
def test_count_is_the_published_one(name: str) -> None:
    assert count(name) == COUNTED[name]


@pytest.mark.parametrize("name", sorted(path.stem for path in CONF.glob("*.yaml")))
def test_a_file_opens_with_its_count(name: str) -> None:
    first = (CONF / f"{name}.yaml").read_text().splitlines()[0]
    said = re.search(r"^# .*?\b(\d+\.(\d+)) ([MB]) parameters", first)
    assert said, first
    assert first.endswith(".")
    counted = 22_713_216 if name == "minilm_l6" else count(name)  # with the pooler that is not used here
    assert f"{counted / {'M': 1e6, 'B': 1e9}[said[3]]:.{len(said[2])}f}" == said[1]


def test_roberta_is_counted_with_the_head_of_its_pre_training_too() -> None:
    model = skeleton(read("roberta_base"), head="pretraining")
    assert sum(value.numel() for value in model.parameters()) == 124_697_433


def test_a_classifier_has_the_labels_that_are_asked_for() -> None:
    for name in ("bert_tiny", "roberta_tiny", "resnet_tiny", "vgg_tiny"):
        few, many = (sum(p.numel() for p in skeleton(read(name), num_labels=n).parameters()) for n in (2, 9))
        width = 64 if "bert" in name else 32
        assert many - few == 7 * (width + 1)


@pytest.mark.parametrize(
    ("name", "number", "ends"),
    [
        ("llama_tiny", 2, ("model.layers.0", "model.layers.1")),
        ("gpt2_tiny", 2, ("transformer.h.0", "transformer.h.1")),
        ("bert_tiny", 2, ("bert.encoder.layer.0", "bert.encoder.layer.1")),
        ("roberta_tiny", 2, ("roberta.encoder.layer.0", "roberta.encoder.layer.1")),
        ("t5_tiny", 4, ("encoder.block.0", "decoder.block.1")),
        ("resnet152", 50, ("resnet.encoder.stages.0.layers.0", "resnet.encoder.stages.3.layers.2")),
        ("vgg16_cifar", 13, ("stages.0.layers.0", "stages.4.layers.2")),
    ],
)
def test_blocks_are_found_in_order(name: str, number: int, ends: tuple[str, str]) -> None:
    model = skeleton(read(name))
    found = blocks(model)
    assert (len(found), found[0][0], found[-1][0]) == (number, *ends)
    assert all(model.get_submodule(key) is module for key, module in found)


@pytest.mark.parametrize("name", EVERY)
def test_blocks_are_disjoint(name: str) -> None:
    seen = [p for _, module in blocks(skeleton(read(name))) for p in module.parameters()]
    assert len(seen) == len(set(seen)) > 0


@pytest.mark.parametrize(
    ("cfg", "message"),
    [
        (schema.ConvNet(kind="convnet", family="vgg", block="plain", stem="imagenet"), r"model.stem=imagenet: .*cifar"),
        (schema.ConvNet(kind="convnet", family="vgg", block="plain", image_size=3), r"model.image_size=3: too small"),
        (schema.Transformer(family="t5"), r"model.tie_embeddings=false: .*must be true"),
        (schema.Transformer(family="bert", num_kv_heads=2), r"model.num_kv_heads=2: bert has num_heads=4"),
    ],
)
def test_a_shape_that_the_family_does_not_have_is_refused(cfg: schema.Model, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        skeleton(cfg)


def test_a_network_sees_the_whole_of_a_larger_image() -> None:
    """VGG's head reads a mean, so more than one position may be left of the image."""
    from families_harness import make

    model = make(read("vgg_tiny")).eval()
    image = torch.randn(1, 3, 32, 32)
    other = image.clone()
    other[..., -1, -1] += 5
    assert not torch.equal(model(image).logits, model(other).logits)
