"""Claims about `model.config`: each parameter is the one that transformers builds of the same file, what a file leaves
out is what transformers takes for it, and a file that cannot be read exactly is refused in one line."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest

from llmsys import compose, schema, shape_file
from llmsys.bench.predict import predict
from llmsys.cost import shapes

SMALL = {"vocab_size": 96, "hidden_size": 64, "intermediate_size": 80, "num_hidden_layers": 2}
HEADS = {"num_attention_heads": 4, "num_key_value_heads": 2}
DENSE = {**SMALL, **HEADS, "max_position_embeddings": 128}
ENCODER = {**SMALL, "num_attention_heads": 4, "max_position_embeddings": 66, "num_labels": 2}
GPT2 = {"vocab_size": 96, "n_embd": 64, "n_layer": 2, "n_head": 4, "n_positions": 128}
T5 = {"vocab_size": 96, "d_model": 64, "d_kv": 16, "d_ff": 80, "num_layers": 2, "num_heads": 4}
CAUSAL, PAIRS, CLASSES = "AutoModelForCausalLM", "AutoModelForSeq2SeqLM", "AutoModelForSequenceClassification"


def theirs(config: Any, head: str) -> dict[str, tuple[int, ...]]:
    """Every parameter of transformers' model, a tied one once, without its bytes."""
    import torch
    import transformers

    with torch.device("meta"):
        model = getattr(transformers, head).from_config(config)
    return {name: tuple(parameter.shape) for name, parameter in model.named_parameters()}


def ours(folder: Path, head: str) -> dict[str, tuple[int, ...]]:
    model = schema.Transformer(**shape_file.shape(str(folder)))
    return shapes.parameters(model, 2 if head == CLASSES else 0)


@pytest.mark.parametrize(
    ("name", "settings", "head"),
    [
        ("Llama", DENSE, CAUSAL),
        ("Llama", {**DENSE, "tie_word_embeddings": True, "head_dim": 32}, CAUSAL),
        ("Mistral", {**DENSE, "head_dim": 24, "sliding_window": None}, CAUSAL),
        ("Ministral", {**DENSE, "head_dim": 24}, CAUSAL),
        ("Qwen2", DENSE, CAUSAL),
        ("Qwen2", {**DENSE, "tie_word_embeddings": True}, CAUSAL),
        ("Qwen3", {**DENSE, "head_dim": 32}, CAUSAL),
        ("GPT2", GPT2, CAUSAL),
        ("GPT2", {**GPT2, "n_inner": 80, "tie_word_embeddings": False}, CAUSAL),
        ("T5", T5, PAIRS),
        ("T5", {**T5, "tie_word_embeddings": False}, PAIRS),
        ("Bert", ENCODER, CLASSES),
        ("Roberta", {**ENCODER, "type_vocab_size": 1}, CLASSES),
        ("XLMRoberta", {**ENCODER, "type_vocab_size": 1}, CLASSES),
    ],
)
def test_every_parameter_is_transformers_own(name: str, settings: dict[str, Any], head: str, tmp_path: Path) -> None:
    """Of the file that transformers writes."""
    import transformers

    config = getattr(transformers, f"{name}Config")(**settings)
    config.save_pretrained(tmp_path)
    assert ours(tmp_path, head) == theirs(config, head)


@pytest.mark.parametrize(
    ("kind", "settings", "head"),
    [
        ("llama", {**SMALL, "num_attention_heads": 4}, CAUSAL),
        (
            "llama",
            {**SMALL, "num_attention_heads": 4, "num_key_value_heads": None, "tie_word_embeddings": True},
            CAUSAL,
        ),
        ("mistral", {**SMALL, "num_attention_heads": 16}, CAUSAL),
        ("ministral", {**SMALL, "num_attention_heads": 16, "head_dim": 4}, CAUSAL),
        ("qwen2", {**SMALL, "num_attention_heads": 32}, CAUSAL),
        ("qwen3", {**SMALL, "num_attention_heads": 32}, CAUSAL),
        ("gpt2", {key: value for key, value in GPT2.items() if key != "n_positions"}, CAUSAL),
        ("t5", {**T5, "d_model": 256, "d_kv": 64}, PAIRS),
        ("bert", {**SMALL, "num_attention_heads": 4}, CLASSES),
        ("roberta", {**SMALL, "num_attention_heads": 4, "type_vocab_size": 1}, CLASSES),
    ],
)
def test_what_a_file_leaves_out_is_what_transformers_takes(
    kind: str, settings: dict[str, Any], head: str, tmp_path: Path
) -> None:
    import transformers

    write(tmp_path, {"model_type": kind, **settings})
    config = transformers.AutoConfig.from_pretrained(tmp_path)
    assert ours(tmp_path, head) == theirs(config, head)
    found = shape_file.shape(str(tmp_path))
    if kind != "t5":  # its positions are relative
        assert found["max_length"] == config.max_position_embeddings - 2 * (kind == "roberta")
    eps = getattr(config, {"llama": "rms_norm_eps", "gpt2": "layer_norm_epsilon"}.get(found["family"], ""), None)
    assert eps is None or found["norm_eps"] == eps


def write(folder: Path, values: Any) -> None:
    (folder / "config.json").write_text(values if isinstance(values, str) else json.dumps(values), encoding="utf-8")


LLAMA = {"model_type": "llama", **DENSE}


@pytest.mark.parametrize(
    ("values", "why"),
    [
        ("{", "not JSON"),
        ("[]", "not a config.json, which is an object"),
        ({}, "model_type=None: is not known here; there are llama, mistral, ministral, qwen2, qwen3, "),
        ({"model_type": "mamba"}, "model_type=mamba: is not known here; there are llama"),
        ({"model_type": "mixtral", "num_local_experts": 8}, "model_type=mixtral: is a mixture of experts"),
        ({"model_type": "qwen2_moe", "num_experts": 60}, "model_type=qwen2_moe: is a mixture of experts"),
        ({"model_type": "phi3"}, "model_type=phi3: keeps queries, keys and values as one tensor"),
        ({"model_type": "gemma"}, "model_type=gemma: has norms that are fp32 throughout"),
        (
            {"model_type": "llama"},
            "of vocab_size, hidden_size, intermediate_size, num_hidden_layers, num_attention_heads",
        ),
        ({"model_type": "gpt2"}, "says nothing of vocab_size, n_embd, n_inner, n_layer, n_head; it is not a whole"),
        ({**LLAMA, "hidden_size": "4096"}, 'hidden_size="4096": must be a whole number, 1 to 2,147,483,647'),
        ({**LLAMA, "num_hidden_layers": 32.5}, "num_hidden_layers=32.5: must be a whole number"),
        ({**LLAMA, "num_hidden_layers": True}, "num_hidden_layers=true: must be a whole number"),
        ({**LLAMA, "num_attention_heads": 0}, "num_attention_heads=0: must be a whole number, 1 to"),
        ({**LLAMA, "hidden_size": 10**30}, "must be a whole number, 1 to 2,147,483,647"),
        ({**LLAMA, "tie_word_embeddings": "no"}, 'tie_word_embeddings="no": must be true or false'),
        ({**LLAMA, "quantization_config": {"bits": 4}}, "quantization_config: weights that are packed already"),
        ({**LLAMA, "hidden_act": "gelu"}, "hidden_act=gelu, and llama as known here has silu"),
        ({**LLAMA, "attention_bias": True}, "attention_bias=True, and llama as known here has False"),
        ({**LLAMA, "rope_parameters": {"rope_type": "llama3"}}, "rope_type=llama3, but only the default one is built"),
        ({**LLAMA, "rope_scaling": {"type": "linear"}}, "rope_type=linear, but only the default one is built"),
        (
            {"model_type": "gpt2", **GPT2, "scale_attn_by_inverse_layer_idx": True},
            "scale_attn_by_inverse_layer_idx=True",
        ),
        ({"model_type": "roberta", **ENCODER}, "type_vocab_size=2, and roberta as known here has 1"),
        (
            {"model_type": "t5", **T5, "feed_forward_proj": "gated-gelu"},
            "feed_forward_proj=gated-gelu, and t5 as known",
        ),
        ({"model_type": "t5", **T5, "d_kv": 32}, "d_kv=32, and t5 here has d_model / num_heads"),
        ({"model_type": "t5", **T5, "num_decoder_layers": 1}, "num_decoder_layers differs from num_layers"),
    ],
)
def test_what_cannot_be_read_is_said_in_one_line(values: Any, why: str, tmp_path: Path) -> None:
    write(tmp_path, values)
    with pytest.raises(ValueError) as caught:
        shape_file.shape(str(tmp_path), build=True)
    assert str(caught.value).startswith(f"model.config={tmp_path}: ")
    assert why in str(caught.value)
    assert "\n" not in str(caught.value)


def test_a_prediction_asks_less_of_rotations_than_a_run(tmp_path: Path) -> None:
    write(tmp_path, {**LLAMA, "rope_parameters": {"rope_type": "llama3", "rope_theta": 5e5}})
    assert shape_file.shape(str(tmp_path))["rope_theta"] == 5e5


def test_a_folder_without_a_file_is_named(tmp_path: Path) -> None:
    for name in (tmp_path, tmp_path / "other.json"):
        with pytest.raises(ValueError, match=f"model.config={name}: no such file; it is a config.json"):
            shape_file.shape(str(name))


QWEN3 = {"model_type": "qwen3", **DENSE, "head_dim": 32, "tie_word_embeddings": True}


def test_a_file_gives_the_whole_shape_of_a_prediction(tmp_path: Path) -> None:
    """Nothing of the experiment's own model is left; a name and a dropout of one's own are taken."""
    write(tmp_path, QWEN3)
    words = ["+exp=bench_predict", f"model.config={tmp_path}", "hardware=a800x8", "train.length=64"]
    made = schema.build(compose.compose([*words, "model.name=mine", "model.num_layers=2"]))
    assert isinstance(made.model, schema.Transformer)
    assert (made.model.name, made.model.head_dim, made.model.qk_norm, made.model.max_length) == ("mine", 32, True, 128)
    assert shapes.num_params(made.model) == sum(map(math.prod, ours(tmp_path, CAUSAL).values()))
    assert predict(made).fits
    for word, why in (
        ("model.num_layers=3", "model.num_layers=3: model.config=.* has 2; leave model.num_layers out"),
        ("model=llama2_7b", "gives the whole shape, and model= another one; leave one of them out"),
    ):
        with pytest.raises(ValueError, match=why):
            compose.compose([*words, word])


def test_a_shape_that_is_predicted_alone_is_not_built(tmp_path: Path) -> None:
    write(tmp_path, QWEN3)
    with pytest.raises(ValueError, match="a shape that is not built here, only predicted"):
        schema.build(compose.compose([f"model.config={tmp_path}", "train.length=64"]))
