"""What every family keeps: seeds, transformers' initial distribution, an fp32 loss, padding that changes nothing."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from families_harness import CLASSES, CONVNETS, ENCODERS, EVERY, TRANSFORMERS, batch, make, read, theirs

from llmsys.models import linear_names, recompute_blocks
from llmsys.models.kernel import observed


def saved_bytes(model: Any, inputs: dict[str, torch.Tensor]) -> int:
    """Bytes that autograd keeps of one forward, whatever they share."""
    sizes = []

    def pack(tensor: torch.Tensor) -> torch.Tensor:
        sizes.append(tensor.nbytes)
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        model(**inputs)
    return sum(sizes)


@pytest.mark.parametrize("name", EVERY)
def test_the_loss_is_the_mean_over_labels_and_reaches_every_parameter(name: str) -> None:
    cfg = read(name)
    model, inputs = make(cfg), batch(cfg)
    out = model(**inputs)
    logits, labels = out.logits, inputs["labels"]
    if cfg.objective == "causal_lm":
        logits, labels = logits[:, :-1], labels[:, 1:]
    by_hand = -logits.log_softmax(-1).flatten(0, -2)[labels.flatten() != -100]
    picked = by_hand.gather(1, labels.flatten()[labels.flatten() != -100, None])
    torch.testing.assert_close(out.loss, picked.mean())
    out.loss.backward()
    assert [key for key, p in model.named_parameters() if p.grad is None or not p.grad.isfinite().all()] == []


@pytest.mark.parametrize("name", EVERY)
def test_random_weights_depend_on_the_seed_and_nothing_else(name: str) -> None:
    one, again, other = make(read(name)), make(read(name)), make(read(name), seed=1)
    for key, value in one.state_dict().items():
        assert torch.equal(value, again.state_dict()[key]), key
        if value.ndim > 1:
            assert not torch.equal(value, other.state_dict()[key]), key


@pytest.mark.parametrize("name", TRANSFORMERS)
def test_a_truncated_model_is_the_beginning_of_the_whole_one(name: str) -> None:
    """GPT-2's output projections are scaled by the depth: the same draws, by the ratio's root."""
    whole, cut = (make(read(name, num_layers=n)).state_dict() for n in (3, 1))
    assert len(whole) > len(cut)
    for key, value in cut.items():
        if name.startswith("gpt2") and key.endswith("c_proj.weight"):
            torch.testing.assert_close(value, whole[key] * 3**0.5)
        else:
            assert torch.equal(value, whole[key]), key


WIDE: dict[str, Any] = {"hidden_size": 128, "intermediate_size": 512}


@pytest.mark.parametrize("name", [n for n in EVERY if n not in ("vgg_tiny", "bert_tiny:mean", "roberta_tiny:mean")])
def test_initial_distribution_is_that_of_transformers(name: str) -> None:
    cfg = read(name, **({"stem": "imagenet", "widths": [64, 128]} if name == "resnet_tiny" else WIDE))
    ours, expected = make(cfg).state_dict(), theirs(cfg).state_dict()
    assert ours.keys() == expected.keys()
    for key, value in ours.items():
        other = expected[key]
        if value.ndim > 1:
            assert value.std().item() == pytest.approx(other.std().item(), rel=5 * value.numel() ** -0.5), key
            assert abs(value.mean().item()) < 5 * value.std().item() * value.numel() ** -0.5, key
        elif key == "classifier.1.bias":
            assert value.abs().max() <= 128**-0.5
        else:
            assert torch.equal(value, other), key  # ones in norms, zeros in biases, statistics of batch norm


def test_vggs_convolutions_keep_the_variance_of_what_flows_back() -> None:
    """He et al., arXiv 1502.01852, eq. 14: n std^2 / 2 = 1 with n the fan out."""
    for key, value in make(read("vgg_tiny", widths=[32, 64])).named_parameters():
        if value.ndim == 4:
            assert 9 * value.shape[0] * value.var().item() / 2 == pytest.approx(1, rel=0.1), key


@pytest.mark.parametrize("name", EVERY)
def test_buffers_are_those_of_a_model_built_on_the_spot(name: str) -> None:
    from llmsys.models import skeleton

    cfg = read(name)
    model = make(cfg)
    assert [key for key, _ in model.named_buffers()] == [key for key, _ in skeleton(cfg).named_buffers()]
    assert all(buffer.device.type == "cpu" for buffer in model.buffers())
    if name.partition(":")[0] != "vgg_tiny":
        expected = dict(theirs(cfg).named_buffers())
        for key, buffer in model.named_buffers():
            torch.testing.assert_close(buffer, expected[key], msg=key)


@pytest.mark.parametrize("name", EVERY)
def test_bf16_is_near_fp32_and_its_loss_is_fp32(name: str) -> None:
    """Batch norm stays in fp32: see `build`."""
    cfg = read(name)
    exact = make(cfg)(**batch(cfg)).loss
    model = make(read(name, dtype="bf16"))
    norms = [m for m in model.modules() if isinstance(m, torch.nn.BatchNorm2d)]
    kept = {tensor for m in norms for tensor in [*m.parameters(), *m.buffers()] if tensor.is_floating_point()}
    assert {tensor.dtype for tensor in kept} <= {torch.float32}
    assert {p.dtype for p in model.parameters() if p not in kept} == {torch.bfloat16}
    loss = model(**batch(cfg)).loss
    assert loss.dtype == torch.float32
    torch.testing.assert_close(loss, exact, rtol=0.03, atol=0)
    loss.backward()
    assert all(p.grad.isfinite().all() for p in model.parameters())


@pytest.mark.parametrize("name", EVERY)
def test_mixed_precision_is_near_fp32(name: str) -> None:
    cfg = read(name)
    exact = make(cfg)(**batch(cfg)).loss
    model = make(cfg)
    with torch.autocast("cpu", torch.bfloat16):
        loss = model(**batch(cfg)).loss
    assert loss.dtype == torch.float32
    torch.testing.assert_close(loss, exact, rtol=0.03, atol=0)
    loss.backward()
    assert {p.grad.dtype for p in model.parameters()} == {torch.float32}


@pytest.mark.parametrize("name", EVERY)
def test_dropout_acts_in_training_alone(name: str) -> None:
    cfg = read(name, dropout=0.3)
    model, inputs = make(cfg), batch(cfg)
    torch.manual_seed(0)
    assert not torch.equal(model(**inputs).logits, model(**inputs).logits)
    fresh, plain = make(cfg).eval(), make(read(name)).eval()
    torch.testing.assert_close(fresh(**inputs).logits, plain(**inputs).logits)


@pytest.mark.parametrize("name", TRANSFORMERS)
def test_recomputation_changes_no_gradient_and_keeps_less(name: str) -> None:
    cfg = read(name, dropout=0.2)
    inputs = batch(cfg)
    plain, again = make(cfg), make(cfg)
    recompute_blocks(again)
    for model in (plain, again):
        torch.manual_seed(0)
        model(**inputs).loss.backward()
    for (key, a), (_, b) in zip(plain.named_parameters(), again.named_parameters(), strict=True):
        torch.testing.assert_close(a.grad, b.grad, msg=key)
    assert saved_bytes(again, inputs) < 0.6 * saved_bytes(plain, inputs)
    assert observed(again, inputs) == observed(plain, inputs)


@pytest.mark.parametrize("name", CONVNETS)
def test_what_is_for_transformers_is_refused(name: str) -> None:
    model = make(read(name))
    with pytest.raises(ValueError, match=r"train.recompute=block: is for transformers"):
        recompute_blocks(model)
    with pytest.raises(ValueError, match=r"method.targets: .*no linear layer"):
        linear_names(model, [])
    assert observed(model, batch(read(name))) == ""


@pytest.mark.parametrize("attention", ["sdpa", "eager", "flash_attention_2"])
@pytest.mark.parametrize("name", TRANSFORMERS)
def test_attention_kinds_agree_and_train(name: str, attention: str) -> None:
    reference, model = make(read(name)), make(read(name, attention=attention))
    inputs = batch(read(name))
    for built in (reference, model):
        built(**inputs).loss.backward()
    for (key, a), (_, b) in zip(reference.named_parameters(), model.named_parameters(), strict=True):
        torch.testing.assert_close(a.grad, b.grad, rtol=1e-3, atol=1e-5, msg=key)


@pytest.mark.parametrize("name", TRANSFORMERS)
def test_the_kernel_that_ran_is_named(name: str) -> None:
    """T5's self-attention adds a trained bias, for which SDPA has no fused kernel; its cross-attention adds zeros."""
    cfg = read(name)
    fused = "sdpa_flash_cpu+sdpa_math" if name == "t5_tiny" else "sdpa_flash_cpu"
    assert observed(make(cfg), batch(cfg)) == fused
    assert observed(make(read(name, attention="eager")), batch(cfg)) == "eager"
    assert observed(make(read(name, dropout=0.1)), batch(cfg)) == "sdpa_math"
    asked = observed(make(read(name, attention="flash_attention_2")), batch(cfg))
    assert asked == f"{fused} (asked: flash_attention_2)"


@pytest.mark.parametrize("name", TRANSFORMERS)
def test_padding_and_its_id_change_nothing(name: str) -> None:
    cfg = read(name)
    model, padded = make(cfg).eval(), batch(cfg)
    longer = {key: value.clone() for key, value in padded.items()}
    for key, filler in (("input_ids", 7), ("attention_mask", 0)):
        longer[key][1, -4:] = filler
        longer[key] = torch.cat([longer[key], torch.full((2, 3), filler)], 1)
    if cfg.objective == "causal_lm":
        longer["labels"] = torch.cat([longer["labels"], torch.full((2, 3), -100)], 1)
    torch.testing.assert_close(model(**longer).loss, model(**padded).loss, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("name", ["bert_tiny", "roberta_tiny"])
def test_no_byte_is_taken_for_padding(name: str) -> None:
    """Under transformers' own ids, 0 and 1, these two bytes would have no gradient, and no position in RoBERTa."""
    model = make(read(name))
    model(**batch(read(name), padding=0)).loss.backward()
    table = model.get_submodule(f"{name.partition('_')[0]}.embeddings.word_embeddings").weight
    assert table[:2].any(1).all()
    assert table.grad[:2].any(1).all()


def test_robertas_positions_are_its_own_where_padding_has_its_id() -> None:
    from transformers.models.roberta.modeling_roberta import RobertaEmbeddings

    from llmsys.models.classifier import roberta_positions

    ids = torch.tensor([[5, 6, 7, 8], [9, 1, 1, 1], [5, 6, 7, 1]])
    expected = RobertaEmbeddings.create_position_ids_from_input_ids(ids, padding_idx=1)
    assert torch.equal(roberta_positions(ids, (ids != 1).long()), expected)
    assert torch.equal(roberta_positions(ids, None), torch.arange(2, 6).expand(3, 4))


@pytest.mark.parametrize("name", ENCODERS)
def test_features_are_what_the_head_reads(name: str) -> None:
    cfg = read(name)
    model = make(cfg).eval()
    inputs = batch(cfg)
    found = model.features(inputs["input_ids"], inputs["attention_mask"])
    whole = model.classifier(found[:, None] if name == "roberta_tiny" else found)
    assert torch.equal(whole, model(**inputs).logits)
    family, mean = cfg.family, cfg.pooling == "mean"
    kwargs = {} if family == "bert" else {"position_ids": torch.arange(2, 10)[None]}
    out = getattr(model, family)(inputs["input_ids"][1:, :8], **kwargs)  # what is not padding
    expected = out.last_hidden_state.mean(1) if mean else out.last_hidden_state[:, 0]
    if family == "bert" and not mean:
        expected = out.pooler_output
    torch.testing.assert_close(found[1:], expected)


def test_one_class_is_no_regression() -> None:
    from llmsys.models import load

    for name in ("bert_tiny", "roberta_tiny", "resnet_tiny"):
        cfg = read(name)
        model = load(cfg, objective=cfg.objective, num_labels=1, device=torch.device("cpu"), seed=0, folder=None)
        inputs = batch(cfg)
        assert model(**{**inputs, "labels": torch.zeros_like(inputs["labels"])}).loss == 0


def test_t5_begins_a_target_with_the_tokenizers_padding() -> None:
    """Bytes: 256, since 0 is a byte. A published vocabulary: 0, as T5 was trained."""
    cfg = read("t5_tiny")
    model, inputs = make(cfg).eval(), batch(cfg)
    labels = inputs["labels"]
    shifted = torch.cat([torch.full((2, 1), 256), labels[:, :-1]], 1)
    shifted[shifted == -100] = 256
    sources = {key: inputs[key] for key in ("input_ids", "attention_mask")}
    assert torch.equal(model(**inputs).logits, model(**sources, decoder_input_ids=shifted).logits)
    assert (model.config.decoder_start_token_id, model.config.eos_token_id) == (256, 258)
    published = make(read("t5_tiny", tokenizer="weights")).config
    assert (published.decoder_start_token_id, published.pad_token_id, published.eos_token_id) == (0, 0, 1)


def test_t5_generates_what_it_would_predict_step_by_step() -> None:
    cfg = read("t5_tiny")
    model, inputs = make(cfg).eval(), batch(cfg)
    sources = {key: inputs[key] for key in ("input_ids", "attention_mask")}
    out = model.generate(**sources, max_new_tokens=5, do_sample=False)
    so_far = torch.full((2, 1), 256)
    with torch.no_grad():
        for _ in range(5):
            following = model(**sources, decoder_input_ids=so_far).logits[:, -1].argmax(-1, keepdim=True)
            so_far = torch.cat([so_far, following], 1)
    assert torch.equal(out, so_far)


@pytest.mark.parametrize("name", CONVNETS)
def test_statistics_of_batch_norm_move_in_training_alone(name: str) -> None:
    cfg = read(name)
    model, inputs = make(cfg), batch(cfg)
    before = {key: buffer.clone() for key, buffer in model.named_buffers()}
    model.eval()(**inputs)
    assert all(torch.equal(before[key], buffer) for key, buffer in model.named_buffers())
    model.train()(**inputs)
    assert not any(torch.equal(before[key], buffer) for key, buffer in model.named_buffers())


def test_resnet_is_transformers_own() -> None:
    cfg = read("resnet_tiny", stem="imagenet", block="bottleneck", widths=[32, 64])
    ours, reference, inputs = make(cfg), theirs(cfg), batch(cfg)
    reference.load_state_dict(ours.state_dict())
    expected = reference(**inputs)
    torch.testing.assert_close(ours(**inputs).logits, expected.logits)
    torch.testing.assert_close(ours(**inputs).loss, expected.loss)
    assert expected.logits.shape == (4, CLASSES)


def test_the_stem_for_small_images_keeps_their_size() -> None:
    model = make(read("resnet_tiny"))
    assert model.resnet.embedder(torch.randn(1, 3, 32, 32)).shape == (1, 16, 32, 32)
