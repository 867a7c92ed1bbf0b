"""Blocks as chains of pieces compute what transformers' own do, and keep what their docstrings say."""

from __future__ import annotations

import copy
import functools
import logging
from typing import Any

import pytest
import torch
from lorafa_harness import LAYERS, R, adapter_grads, batch, build, error, kept, with_adapters, written
from torch import Tensor, nn

from llmsys.lorafa import merge, unmerge
from llmsys.lorafa.blocks import fuse_blocks
from llmsys.lorafa.blocks.block import Fused
from llmsys.lorafa.targets import adapted
from llmsys.models import blocks
from llmsys.schema.recompute import POLICIES

TRAINED = [False, True]
MAIN = ["llama", "bert", "roberta", "t5", "t5_gated"]
KERNELS = [
    pytest.param(family, attention, marks=[] if family in MAIN or attention == "sdpa" else pytest.mark.slow)
    for family in LAYERS
    for attention in ("sdpa", "eager")
]


@functools.cache
def _base(family: str, **changes: Any) -> Any:
    return build(family, **changes)


def fresh(family: str, start: bool = False, changes: dict[str, Any] | None = None, **config: Any) -> Any:
    """A fused model with adapters."""
    return with_adapters(copy.deepcopy(_base(family, **(changes or {}))), start, **config).train()


def run(model: Any, inputs: dict[str, Any]) -> tuple[Tensor, Tensor]:
    """(loss, logits)."""
    out = model(**inputs)
    return out.loss, out.logits


@pytest.mark.parametrize(("family", "attention"), KERNELS)
def test_forward_is_transformers_own_bit_for_bit_while_b_is_zero(family: str, attention: str) -> None:
    """With and without a padding mask, training and evaluating, in fp32, bf16 and autocast, whatever the policy."""
    for dtype, autocast in ((torch.float32, False), (torch.float32, True), (torch.bfloat16, False)):
        theirs = copy.deepcopy(_base(family, attention=attention)).to(dtype)
        ours = with_adapters(copy.deepcopy(theirs), start=True)
        assert all(isinstance(block, Fused) for _, block in blocks(ours))
        for policy, padding, training in (("none", 5, True), ("attn+mlp", 0, True), ("mlp", 5, False)):
            fuse_blocks(ours, policy)
            inputs = batch(family, padding)
            with torch.autocast("cpu", torch.bfloat16, autocast):
                assert torch.equal(run(ours.train(training), inputs)[1], run(theirs.train(training), inputs)[1])


@pytest.mark.parametrize("train_a", TRAINED)
@pytest.mark.parametrize("family", MAIN)
def test_gradients_are_autograd_s_own(family: str, train_a: bool) -> None:
    """Of the same adapters written out, in transformers' blocks: 1e-6 in fp32; and no policy changes a number."""
    model = fresh(family, train_a=train_a)
    reference = written(model)
    inputs = batch(family)
    expected_loss, _ = run(reference, inputs)
    expected_loss.backward()
    expected = adapter_grads(reference)
    assert len(expected) == (2 if train_a else 1) * len(list(adapted(model)))
    losses = []
    for policy in POLICIES:
        fuse_blocks(model, policy)
        model.zero_grad()
        loss, _ = run(model, inputs)
        loss.backward()
        losses.append(loss.item())
        found = adapter_grads(model)
        assert found.keys() == expected.keys()
        assert max(error(found[name], expected[name]) for name in expected) < 1e-6, policy
    assert losses == [losses[0]] * len(POLICIES)
    assert error(loss.detach(), expected_loss.detach()) < 1e-6


@pytest.mark.parametrize("autocast", [False, True])
@pytest.mark.parametrize("family", MAIN)
def test_gradients_in_bf16_are_as_near_to_the_exact_ones_as_autograd_s(family: str, autocast: bool) -> None:
    """The exact ones: the same weights in fp32. A hundredth, or (T5, whose signs flip) what operators one by one
    reach."""
    model = fresh(family, changes={"layers": 1}, train_a=True)
    for tensor in (*model.parameters(), *model.buffers()):
        if tensor.is_floating_point():
            tensor.data = tensor.data.bfloat16().float()
    exact, eager = written(model), written(model)
    if not autocast or family == "bert":  # autocast casts the weights of LayerNorm to fp32
        model, eager = model.bfloat16(), eager.bfloat16()
    inputs = batch(family)
    weights = torch.randn(run(exact, inputs)[1].shape, generator=torch.Generator().manual_seed(7))
    (run(exact, inputs)[1] * weights).sum().backward()
    errors = []
    for each in (eager, model):
        with torch.autocast("cpu", torch.bfloat16, autocast):
            logits = run(each, inputs)[1]
        (logits.float() * weights).sum().backward()
        errors.append(error(_flat(each), _flat(exact)))
    assert errors[1] < max(1e-2, 1.5 * errors[0])


def _flat(model: nn.Module) -> Tensor:
    return torch.cat([grad.flatten().float() for grad in adapter_grads(model).values()])


@pytest.mark.parametrize("policy", ["none", "mlp", "attn+mlp", "block"])
@pytest.mark.parametrize("family", ["llama", "bert", "t5"])
def test_dropout_is_the_same_in_both_passes(family: str, policy: str) -> None:
    """Of adapters, hidden states and probabilities: the gradient is the slope of a loss with the same draws, which it
    is only if every mask is drawn again as it was. In fp64, by central differences."""
    rates = {"llama": ["attention_dropout"], "t5": ["dropout_rate"]}
    names = rates.get(family, ["hidden_dropout_prob", "attention_probs_dropout_prob"])
    model = fresh(family, changes=dict.fromkeys(names, 0.3), train_a=True, dropout=0.3, recompute=policy).double()
    parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
    directions = [_normal(parameter.shape, seed) for seed, parameter in enumerate(parameters)]
    weights = _normal(run(model, batch(family))[1].shape, seed=100)

    def loss(step: float, seed: int = 11) -> Tensor:
        for parameter, direction in zip(parameters, directions, strict=True):
            parameter.data += step * direction
        torch.manual_seed(seed)
        logits = run(model, batch(family))[1]
        for parameter, direction in zip(parameters, directions, strict=True):
            parameter.data -= step * direction
        return (logits * weights).sum()

    grads = torch.autograd.grad(loss(0.0), parameters)
    slopes = [float((grad * direction).sum()) for grad, direction in zip(grads, directions, strict=True)]
    with torch.no_grad():
        measured = float(loss(1e-5) - loss(-1e-5)) / 2e-5
        assert loss(0.0) != loss(0.0, seed=12)
    assert abs(sum(slopes) - measured) < 5e-3 * sum(abs(slope) for slope in slopes)


def _normal(shape: torch.Size, seed: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


D, F, HEADS = 64, 160, 4


def closed_form(family: str, policy: str, train_a: bool, side: str = "decoder", keys: float = 1.0) -> float:
    """What a block keeps in bf16 over (batch x length x D) bytes: the formulas of `blocks/<family>.py`, z, lse and the
    norms' statistics included."""
    phi, z, lse = F / D, 2 * R / D, 4 * HEADS / D
    if policy == "block":
        return 2.0
    attn, mlp = policy != "attn+mlp", policy == "none"
    if family == "llama":
        return 4 + 2 * 4 / D + 7 * z + attn * (4 + 4 * keys + lse) + mlp * 4 * phi
    if family == "bert":
        x = 2 * (train_a or not attn)
        return 4 + x + 4 * 2 / D + 6 * z + attn * (8 + lse) + mlp * 2 * phi
    gated = family == "t5_gated"
    kept = 4 * phi if gated else 2 * phi if train_a else phi / 8
    own = 4 + 2 * 4 / D + (4 + 2 + gated) * z + attn * (8 + lse) + mlp * kept
    if side == "encoder":
        return own
    ratio = 2  # of the lengths in `batch`
    return own + 2 + 4 / D + 2 * z + 2 * ratio * z + attn * (4 + lse + 4 * ratio)


def kept_per_block(family: str, side: str = "decoder", padding: int = 5, changes: Any = None, **config: Any) -> float:
    """Measured, over (batch x length x D): the difference that a third block makes. (What T5's first block makes for
    all others, the bias, a checkpoint of the second one keeps for all.)"""
    found = []
    for layers in (2, 3):
        shape: dict[str, Any] = {"layers": layers, "d": D, "f": F, **(changes or {})}
        if "t5" in family:
            counts = {"encoder": (layers, 1), "decoder": (1, layers)}[side]
            shape |= {"layers": counts[0], "num_decoder_layers": counts[1]}
        model = with_adapters(build(family, **shape).bfloat16(), **config)
        inputs = batch(family, padding)
        found.append(kept(model, lambda model=model, inputs=inputs: run(model, inputs)[0]))  # type: ignore[misc]
    tokens = inputs["labels"].numel() if side == "decoder" else inputs["input_ids"].numel()
    return (found[1] - found[0]) / (tokens * shape["d"])


@pytest.mark.parametrize("train_a", TRAINED)
@pytest.mark.parametrize("policy", POLICIES)
@pytest.mark.parametrize("family", ["llama", "bert", "t5:encoder", "t5:decoder", "t5_gated:encoder"])
def test_what_a_block_keeps_is_its_closed_form(family: str, policy: str, train_a: bool) -> None:
    name, _, side = family.partition(":")
    side = side or "decoder"
    padding = 0 if name == "llama" else 5
    found = kept_per_block(name, side, padding, recompute=policy, train_a=train_a)
    keys = 0.5  # `build` has half as many heads of keys
    assert found == pytest.approx(closed_form(name, policy, train_a, side, keys), rel=1e-2)


@pytest.mark.parametrize("dropout", [0.0, 0.1])
@pytest.mark.parametrize("groups", [1, 4])
def test_adapters_dropout_keeps_nothing_whatever_heads_share(groups: int, dropout: float) -> None:
    for policy in ("none", "attn+mlp"):
        changes = {"num_key_value_heads": HEADS // groups}
        found = kept_per_block("llama", padding=0, changes=changes, recompute=policy, dropout=dropout)
        assert found == pytest.approx(closed_form("llama", policy, False, keys=1 / groups), rel=1e-2)


@pytest.mark.parametrize("train_a", TRAINED)
@pytest.mark.parametrize(("policy", "most"), [("none", 22.8), ("mlp", 12.1), ("attn+mlp", 4.04)])
def test_a_block_of_llama_s_shape_keeps_as_little_as_was_asked_for(policy: str, most: float, train_a: bool) -> None:
    """bf16, F/D of LLaMA-7B, as many heads of keys as of queries; z and the attention's lse apart. Freezing A changes
    nothing here: all that a trained A reads is computed again. (4.0 would be met at 7B: 4 bytes x 2 rstd are 8/D.)"""
    d, f = 256, 688
    changes = {"d": d, "f": f, "num_key_value_heads": HEADS}
    found = kept_per_block("llama", padding=0, changes=changes, recompute=policy, train_a=train_a)
    assert found - 14 * R / d - (policy != "attn+mlp") * 4 * HEADS / d <= most


def test_under_a_padding_mask_sdpa_gets_all_heads_keys() -> None:
    found = kept_per_block("llama", recompute="none")
    assert found == pytest.approx(closed_form("llama", "none", False, keys=1.0), rel=1e-2)


@pytest.mark.parametrize(
    ("family", "rate"), [("llama", "attention_dropout"), ("bert", ""), ("t5:encoder", "dropout_rate")]
)
def test_dropout_adds_nothing_and_takes_the_kernel_s_output_away(family: str, rate: str) -> None:
    """Adapters', hidden and, on a CPU, that of probabilities, where torch's own would keep [B, H, L, L] three times."""
    name, _, side = family.partition(":")
    changes = {rate: 0.1} if rate else {"hidden_dropout_prob": 0.1, "attention_probs_dropout_prob": 0.1}
    found = kept_per_block(name, side or "decoder", changes=changes, dropout=0.1)
    expected = closed_form(name, "none", False, side or "decoder") - 2 - 4 * HEADS / D  # out and lse
    assert found == pytest.approx(expected - 2 * (name == "llama") * 0.5 * 2, rel=1e-2)


@pytest.mark.parametrize("family", ["llama", "mistral", "t5", pytest.param("mt5", marks=pytest.mark.slow)])
def test_generation_gives_the_same_tokens_with_the_same_scores(family: str) -> None:
    """One at a time, on a cache, for prompts padded on the left; greedy and with beams, on a static cache too."""
    theirs = copy.deepcopy(_base(family)).eval()
    inputs = batch(family, padding=0)
    mask = torch.ones_like(inputs["input_ids"])
    mask[0, :4] = 0
    for policy in ("none", "attn+mlp", "block"):
        ours = with_adapters(copy.deepcopy(theirs), start=True, recompute=policy).eval()
        for how in ({}, {"num_beams": 2}, {"cache_implementation": "static"}) if policy == "none" else ({},):
            found = [
                model.generate(
                    input_ids=inputs["input_ids"],
                    attention_mask=mask,
                    max_new_tokens=6,
                    do_sample=False,
                    output_logits=True,
                    return_dict_in_generate=True,
                    use_cache=True,
                    **how,
                )
                for model in (ours, theirs)
            ]
            assert torch.equal(found[0].sequences, found[1].sequences)
            assert all(torch.equal(*pair) for pair in zip(found[0].logits, found[1].logits, strict=True))


def test_a_bert_that_decodes_crosses_to_its_encoder() -> None:
    """Bit for bit with and without a cache, and the gradients that autograd finds."""
    import transformers

    shape = {"hidden_size": 32, "intermediate_size": 56, "num_hidden_layers": 1, "num_attention_heads": 4}
    shape |= {"vocab_size": 64, "hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}
    torch.manual_seed(0)
    encoder = transformers.BertModel(transformers.BertConfig(**shape))
    decoder = transformers.BertLMHeadModel(transformers.BertConfig(**shape, is_decoder=True, add_cross_attention=True))
    theirs = transformers.EncoderDecoderModel(encoder=encoder, decoder=decoder).requires_grad_(False)
    theirs.config.decoder_start_token_id, theirs.config.pad_token_id = 2, 0
    inputs = {"input_ids": batch("t5")["input_ids"], "decoder_input_ids": batch("t5")["labels"], "use_cache": False}
    ours = with_adapters(copy.deepcopy(theirs), start=True, recompute="attn+mlp")
    assert torch.equal(ours(**inputs).logits, theirs(**inputs).logits)
    tokens = [
        each.eval().generate(
            inputs["input_ids"], max_new_tokens=5, decoder_start_token_id=2, pad_token_id=0, do_sample=False
        )
        for each in (ours, theirs)
    ]
    assert torch.equal(*tokens)
    model = with_adapters(copy.deepcopy(theirs), train_a=True)
    reference = written(model)
    reference(**inputs).logits.square().mean().backward()
    expected = adapter_grads(reference)
    for policy in ("none", "attn+mlp"):
        fuse_blocks(model, policy)
        model.zero_grad()
        model(**inputs).logits.square().mean().backward()
        found = adapter_grads(model)
        assert max(error(found[name], expected[name]) for name in expected) < 1e-6


@pytest.mark.parametrize("policy", ["none", "attn+mlp"])
def test_what_else_is_trained_gets_its_gradient(policy: str) -> None:
    """Embeddings in front (so that the first block hands one on), norms, biases, and T5's position bias, which is then
    not made once for all blocks."""
    for family in ("llama", "qwen3", "bert", "t5"):
        model = fresh(family, recompute=policy)
        reference = written(model)
        for each in (model, reference):
            for name, parameter in each.named_parameters():
                kinds = ("norm", "LayerNorm", "relative_attention_bias", "embeddings.word", "embed_tokens", "shared")
                parameter.requires_grad_(name.endswith((".A", ".B")) or any(kind in name for kind in kinds))
            run(each, batch(family))[0].backward()
        theirs = {name: p.grad for name, p in reference.named_parameters() if p.grad is not None}
        ours = {
            name.replace("adapters.default.", ""): p.grad for name, p in model.named_parameters() if p.grad is not None
        }
        frozen = {name for name in theirs if name.endswith(".A")}
        assert theirs.keys() - frozen == ours.keys()
        assert len(ours) > 14
        assert max(error(ours[name], theirs[name]) for name in ours) < 2e-6


def test_each_block_can_have_a_policy_of_its_own() -> None:
    """T5: the encoder's blocks, then the decoder's. Each keeps what it keeps alone, and policies can be changed."""
    model = fresh("t5")
    inputs = batch("t5")
    run(model, inputs)[0].backward()
    expected = adapter_grads(model)
    plain = kept(model, lambda: run(model, inputs)[0])
    assert fuse_blocks(model, ["none", "block", "mlp", "attn+mlp"]) == 4
    assert [block.gradient_checkpointing for _, block in blocks(model)] == [False, True, False, False]
    assert [block.policy for _, block in blocks(model)] == ["none", "block", "mlp", "attn+mlp"]
    model.zero_grad()
    run(model, inputs)[0].backward()
    assert max(error(grad, expected[name]) for name, grad in adapter_grads(model).items()) < 1e-6
    assert kept(model, lambda: run(model, inputs)[0]) < 0.8 * plain
    fuse_blocks(model, "none")
    assert kept(model, lambda: run(model, inputs)[0]) == plain


def test_wrong_policies_are_refused(caplog: pytest.LogCaptureFixture) -> None:
    with pytest.raises(ValueError, match=r"recompute=all: must be one of none, mlp, attn\+mlp, block"):
        fuse_blocks(fresh("llama"), "all")
    with pytest.raises(ValueError, match=r"recompute: names 3 blocks, and LlamaForCausalLM has 2"):
        fuse_blocks(fresh("llama"), ["none"] * 3)
    import transformers

    shape = {"n_embd": 32, "n_layer": 2, "n_head": 4, "vocab_size": 64, "n_positions": 32}
    gpt2 = transformers.GPT2LMHeadModel(transformers.GPT2Config(**shape, resid_pdrop=0, embd_pdrop=0, attn_pdrop=0))
    for model in (gpt2, nn.Sequential(nn.Linear(2, 2))):
        for policy in ("mlp", "attn+mlp"):
            with pytest.raises(ValueError, match=r"recompute=.*mlp: is for blocks of LlamaDecoderLayer, .*T5Block"):
                fuse_blocks(model, policy)
    expected = gpt2(**batch("llama")).logits
    with caplog.at_level(logging.WARNING, logger="llmsys"):
        with_adapters(gpt2, start=True)
    assert [record.getMessage() for record in caplog.records if record.name.startswith("llmsys")] == [
        "blocks of GPT2Block keep their own forward pass: only their adapted layers save"
    ]
    assert torch.equal(gpt2(**batch("llama")).logits, expected)
    fuse_blocks(gpt2, "block")
    gpt2(**batch("llama")).loss.backward()
    assert len(adapter_grads(gpt2)) == 8


@pytest.mark.parametrize("family", ["llama", "bert", "t5"])
def test_who_asks_for_probabilities_gets_them(family: str) -> None:
    theirs = copy.deepcopy(_base(family, attention="eager"))
    ours = with_adapters(copy.deepcopy(theirs), start=True)
    found, expected = (
        model(**batch(family), output_attentions=True, output_hidden_states=True) for model in (ours, theirs)
    )
    names = ["attentions", "hidden_states"]
    if family == "t5":
        names = ["encoder_attentions", "decoder_attentions", "cross_attentions", "encoder_hidden_states"]
    for name in names:
        assert len(getattr(found, name)) >= 2
        assert all(torch.equal(*pair) for pair in zip(getattr(found, name), getattr(expected, name), strict=True))


def test_training_that_computes_attention_again_fills_no_cache(caplog: pytest.LogCaptureFixture) -> None:
    """A model whose configuration asks for a cache makes one in training too: it would be filled twice."""
    model = fresh("llama", recompute="attn+mlp", changes={"use_cache": True})
    inputs = {**batch("llama"), "use_cache": True}
    out = model(**inputs)
    assert out.past_key_values.get_seq_length() == 0
    out.loss.backward()
    assert model.eval()(**inputs).past_key_values.get_seq_length() == 16
    assert len(adapter_grads(model)) == 14


def test_masks_are_made_once_for_all_blocks() -> None:
    """T5's bias and mask, [B, H, L, L], would be more than all that a block keeps: as many are kept for four blocks as
    for two, one for each of the three attentions."""
    for layers in (2, 4):
        model, inputs = fresh("t5", changes={"layers": layers}).bfloat16(), batch("t5", target=12)
        seen: dict[int, Tensor] = {}

        def note(tensor: Tensor, seen: dict[int, Tensor] = seen) -> Tensor:
            seen[tensor.untyped_storage().data_ptr()] = tensor
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor):
            loss = run(model, inputs)[0]
        masks = [tuple(each.shape[2:]) for each in seen.values() if each.dim() == 4 and each.shape[3] != 8]  # q, k, v
        assert sorted(masks) == [(12, 12), (12, 16), (16, 16)]
        loss.backward()


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:The .grad attribute")  # which Dynamo reads of every tensor at a graph break
@pytest.mark.parametrize("policy", ["none", "attn+mlp"])
@pytest.mark.parametrize("family", ["llama", "bert", "t5"])
def test_torch_compile_changes_nothing(family: str, policy: str) -> None:
    model = fresh(family, changes={"layers": 1}, recompute=policy)
    inputs = batch(family)
    loss = run(model, inputs)[0]
    loss.backward()
    expected = adapter_grads(model)
    model.zero_grad()
    torch.compiler.reset()
    again = torch.compile(model, backend="aot_eager")(**inputs).loss
    again.backward()
    assert error(again.detach(), loss.detach()) < 1e-6
    assert max(error(grad, expected[name]) for name, grad in adapter_grads(model).items()) < 1e-6


def test_weights_that_were_changed_or_replaced_in_between_are_refused() -> None:
    """They are read anew in the backward pass: silently, gradients would be those of another function."""
    model = fresh("llama", recompute="mlp")
    trained = {name: p for name, p in model.named_parameters() if p.requires_grad}
    loss = run(model, batch("llama"))[0]
    with torch.no_grad():
        next(iter(trained.values())).mul_(2)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()
    loss = run(model, batch("llama"))[0]
    merge(model)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()
    unmerge(model)
    others = {name: p.detach().clone().requires_grad_() for name, p in trained.items()}
    loss = torch.func.functional_call(model, others, (), batch("llama"))[0]
    with pytest.raises(RuntimeError, match="was replaced after the forward pass"):
        loss.backward()


def test_a_backward_pass_within_autocast_is_as_outside() -> None:
    """But for the head, whose products autograd then computes in bf16."""
    model = fresh("llama", recompute="attn+mlp")
    found = []
    for enabled in (False, True):
        model.zero_grad()
        loss = run(model, batch("llama"))[0]
        with torch.autocast("cpu", torch.bfloat16, enabled):
            loss.backward()
        found.append(_flat(model))
    assert error(found[1], found[0]) < 1e-2


def test_a_mask_that_is_written_to_counts_anew() -> None:
    """A static buffer, say: the float mask made of it is kept for all blocks, and not beyond."""
    model = fresh("llama", recompute="none")
    theirs = written(model)
    ids = batch("llama")["input_ids"]
    mask = torch.ones(*ids.shape, ids.shape[1], dtype=torch.bool).tril()[:, None]
    for _ in range(2):
        ours, expected = (each(input_ids=ids, attention_mask=mask).logits for each in (model, theirs))
        torch.testing.assert_close(ours, expected, atol=1e-5, rtol=1e-5)
        mask[..., 1:, 0] = False
    with torch.inference_mode():
        model(input_ids=ids, attention_mask=mask)
    run(model, {**batch("llama"), "attention_mask": mask})[0].backward()
