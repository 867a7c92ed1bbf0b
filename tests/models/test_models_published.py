"""A file that transformers wrote gives transformers' own outputs in every family, or is refused by a field's name."""

from __future__ import annotations

import json
import logging
from pathlib import Path
from typing import Any

import pytest
import torch
from families_harness import EVERY, batch, make, read, theirs
from safetensors.torch import load_file, save_file

from llmsys import schema
from llmsys.models import weights
from llmsys.train.methods import Full

PUBLISHED = ["llama_tiny", "gpt2_tiny", "bert_tiny", "roberta_tiny", "t5_tiny", "resnet_tiny"]


def shape(name: str, **changes: Any) -> Any:
    """Of ResNet, the published stem."""
    return read(name, **({"stem": "imagenet", **changes} if name == "resnet_tiny" else changes))


def published(cfg: schema.Model, folder: Path, **changes: Any) -> Any:
    """transformers' model with every tensor disturbed, saved by transformers; `changes` in the config.json."""
    model = theirs(cfg)
    torch.manual_seed(1)
    with torch.no_grad():
        for tensor in model.state_dict().values():
            if tensor.is_floating_point():
                tensor.add_(torch.rand_like(tensor) * 0.1)
    model.save_pretrained(folder)
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, **changes}))
    return model.eval()


def inputs_for(cfg: schema.Model) -> dict[str, torch.Tensor]:
    """Padded with 1 and without 1 elsewhere: RoBERTa's own class finds padding by its id."""
    inputs = batch(cfg)
    if cfg.family == "roberta":
        inputs["input_ids"] = inputs["input_ids"].clamp(min=2).masked_fill(inputs["attention_mask"] == 0, 1)
    return inputs


@pytest.mark.parametrize("name", PUBLISHED)
def test_what_transformers_saved_gives_transformers_own_outputs(name: str, tmp_path: Path) -> None:
    cfg = shape(name)
    reference, ours = published(cfg, tmp_path), make(cfg, folder=tmp_path).eval()
    inputs = inputs_for(cfg)
    with torch.no_grad():
        found, expected = ours(**inputs), reference(**inputs)
    torch.testing.assert_close(found.logits, expected.logits, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(found.loss, expected.loss)
    assert make(cfg).eval()(**inputs).loss != found.loss


@pytest.mark.parametrize("name", ["gpt2_tiny", "bert_tiny", "roberta_tiny", "resnet_tiny"])
def test_a_body_without_its_head_is_read_too(name: str, tmp_path: Path) -> None:
    """As GPT-2, BERT and RoBERTa were published: names begin inside the body, and heads of pre-training or computed
    buffers may stand beside them."""
    cfg = shape(name)
    reference = published(cfg, tmp_path)
    body = getattr(reference, reference.base_model_prefix)
    state = {key: value.contiguous() for key, value in body.state_dict().items()}
    extra = {
        "gpt2": {"h.0.attn.bias": torch.ones(1, 1, 8, 8), "h.1.attn.masked_bias": torch.tensor(-1e4)},
        "bert": {"cls.predictions.bias": torch.zeros(320), "embeddings.position_ids": torch.arange(512)},
        "roberta": {"pooler.dense.weight": torch.zeros(64, 64), "lm_head.bias": torch.zeros(320)},
    }.get(cfg.family, {})
    save_file({**state, **extra}, tmp_path / weights.FILE)
    ours = make(cfg, folder=tmp_path)
    found = getattr(ours, reference.base_model_prefix).state_dict()
    assert all(torch.equal(value, found[key]) for key, value in state.items())
    fresh = make(cfg).state_dict()
    heads = [key for key in fresh if key.startswith("classifier.")]
    assert bool(heads) == (cfg.family != "gpt2")
    assert all(torch.equal(ours.state_dict()[key], fresh[key]) for key in heads)


@pytest.mark.parametrize("name", ["gpt2_tiny", "bert_tiny", "roberta_tiny", "t5_tiny"])
def test_layers_beyond_the_shape_are_left_out(name: str, tmp_path: Path) -> None:
    reference = published(shape(name, num_layers=3), tmp_path).state_dict()
    cut = make(shape(name, num_layers=1), folder=tmp_path)
    assert all(torch.equal(value, reference[key]) for key, value in cut.state_dict().items())


def test_every_name_of_a_tied_table_is_read_and_must_agree(tmp_path: Path) -> None:
    """Old files hold one table under several names, or under one that is not the model's first; T5's hold a bias that
    T5 does not read, too."""
    cfg = read("t5_tiny")
    published(cfg, tmp_path)
    path = tmp_path / weights.FILE
    state = load_file(path)
    table = state.pop("shared.weight")
    unread = {"decoder.block.0.layer.1.EncDecAttention.relative_attention_bias.weight": torch.zeros(32, 4)}
    save_file({**state, **unread, "encoder.embed_tokens.weight": table}, path)
    model = make(cfg, folder=tmp_path)
    assert torch.equal(model.shared.weight, table)
    assert model.lm_head.weight is model.shared.weight is model.decoder.embed_tokens.weight
    save_file({**state, "shared.weight": table, "lm_head.weight": table.clone()}, path)
    assert torch.equal(make(cfg, folder=tmp_path).shared.weight, table)
    save_file({**state, "shared.weight": table, "lm_head.weight": table + 1}, path)
    with pytest.raises(ValueError, match=r"weight is not shared.weight, to which model t5_tiny ties it"):
        make(cfg, folder=tmp_path)


@pytest.mark.parametrize("name", ["bert_tiny", "roberta_tiny", "resnet_tiny"])
def test_a_head_of_other_classes_begins_anew_and_says_so(
    name: str, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    cfg = shape(name)
    published(cfg, tmp_path)
    path = tmp_path / weights.FILE
    state = load_file(path)
    last = [key for key in state if key.startswith("classifier.") and state[key].shape[0] == 3]
    save_file({**state, **{key: torch.ones(7, *state[key].shape[1:]) for key in last}}, path)
    with caplog.at_level(logging.WARNING):
        ours, fresh = make(cfg, folder=tmp_path).state_dict(), make(cfg).state_dict()
    assert len(last) == 2
    assert all(torch.equal(ours[key], fresh[key]) for key in last)
    assert len([r for r in caplog.records if "the head begins anew" in r.message]) == 2
    kept = [key for key in ours if key not in last and ours[key].ndim > 1]
    assert all(torch.equal(ours[key], state[key]) for key in kept)


@pytest.mark.parametrize("name", EVERY)
@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
def test_what_a_run_leaves_comes_back_bit_for_bit(name: str, dtype: str, tmp_path: Path) -> None:
    """Batch norm's statistics included: without them a trained network would evaluate as an untrained one."""
    cfg = read(name, dtype=dtype)
    model = make(cfg, seed=3)
    method = Full()
    method.prepare(model)(**batch(cfg)).loss.backward()
    method.save(method.state(model), tmp_path / "weights", {})
    again = make(cfg, folder=tmp_path / "weights")
    for key, value in model.state_dict().items():
        assert torch.equal(value, again.state_dict()[key]), key
    if isinstance(cfg, schema.ConvNet):
        assert int(model.state_dict()[next(k for k in model.state_dict() if "num_batches" in k)]) == 1


@pytest.mark.parametrize("name", EVERY)
def test_a_methods_state_is_all_that_training_changes(name: str) -> None:
    cfg = read(name)
    model, method = make(cfg, seed=3), Full()
    state = method.state(method.prepare(model))
    assert {id(value) for value in state.values()} >= {id(value) for value in model.parameters()}
    other = make(cfg, seed=4)
    method.load_state(method.prepare(other), state)
    assert all(torch.equal(value, other.state_dict()[key]) for key, value in model.state_dict().items())


@pytest.mark.parametrize(
    ("name", "changes", "message"),
    [
        ("gpt2_tiny", {"model_type": "llama"}, "model_type=llama, but model.family=gpt2"),
        ("gpt2_tiny", {"n_head": 2}, "n_head=2, but model.num_heads=4"),
        ("gpt2_tiny", {"n_layer": 1}, "n_layer=1, but model.num_layers=2"),
        ("gpt2_tiny", {"n_positions": 64}, "n_positions=64, but model.max_length=512"),
        ("gpt2_tiny", {"activation_function": "relu"}, "activation_function=relu"),
        ("gpt2_tiny", {"tie_word_embeddings": False}, "tie_word_embeddings=False, but model.tie_embeddings=True"),
        ("bert_tiny", {"max_position_embeddings": 1024}, "max_position_embeddings=1024, but model.max_length=512"),
        ("bert_tiny", {"layer_norm_eps": 1e-5}, "layer_norm_eps=1e-05, but model.norm_eps=1e-12"),
        ("bert_tiny", {"hidden_act": "relu"}, "hidden_act=relu, but model.family=bert as built here has gelu"),
        ("roberta_tiny", {"max_position_embeddings": 512}, "max_position_embeddings=512 (two of them are reserved)"),
        ("roberta_tiny", {"pad_token_id": 0}, "pad_token_id=0"),
        ("roberta_tiny", {"num_hidden_layers": 1}, "num_hidden_layers=1, but model.num_layers=2"),
        ("t5_tiny", {"feed_forward_proj": "gated-gelu"}, "feed_forward_proj=gated-gelu"),
        ("t5_tiny", {"d_kv": 64}, "d_kv=64"),
        ("t5_tiny", {"num_decoder_layers": 1}, "num_decoder_layers=1, but model.num_layers=2"),
        (
            "t5_tiny",
            {"decoder_start_token_id": 0},
            "decoder_start_token_id=0, but with model.tokenizer=bytes",
        ),
        ("resnet_tiny", {"depths": [1, 2]}, "depths=[1, 2], but model.depths=[1, 1]"),
        ("resnet_tiny", {"layer_type": "bottleneck"}, "layer_type=bottleneck, but model.block=basic"),
        ("resnet_tiny", {"embedding_size": 64}, "embedding_size=64, the channels of its 7x7 stem"),
        ("resnet_tiny", {"downsample_in_bottleneck": True}, "downsample_in_bottleneck=True"),
    ],
)
def test_config_beside_the_weights_must_agree(name: str, changes: dict[str, Any], message: str, tmp_path: Path) -> None:
    cfg = shape(name)
    published(cfg, tmp_path, **changes)
    with pytest.raises(ValueError) as caught:
        make(cfg, folder=tmp_path)
    assert message in str(caught.value)
    assert "config.json" in str(caught.value)


def test_a_published_network_has_the_stem_of_imagenet(tmp_path: Path) -> None:
    published(shape("resnet_tiny"), tmp_path)
    with pytest.raises(ValueError, match=r"config.json: .*7x7 stem, but model.stem=cifar"):
        make(read("resnet_tiny"), folder=tmp_path)
