"""The chunked loss is transformers' own, with gradients, in less memory: the logits never exist whole."""

from __future__ import annotations

import contextlib
import itertools
from typing import Any

import pytest
import torch
from families_harness import batch, make, read
from torch import Tensor, nn
from torch.nn import functional as F
from transformers.loss.loss_utils import ForCausalLMLoss

from llmsys.models import chunk_loss
from llmsys.models.linear_cross_entropy import chunk_rows, linear_cross_entropy
from llmsys.profile.live import Live

B, L, D, V = 3, 17, 32, 500
DTYPES = {"fp32": (torch.float32, False), "bf16": (torch.bfloat16, False), "autocast": (torch.float32, True)}
FAMILIES = ["llama_tiny", "gpt2_tiny", "t5_tiny"]


def problem(dtype: torch.dtype, *, bias: bool = False) -> tuple[list[Tensor], Tensor]:
    """(h [B, L, D], weight [V, D] and perhaps a bias, labels of which some are ignored)."""
    generator = torch.Generator().manual_seed(0)
    shapes = [(B, L, D), (V, D), (V,)][: 3 if bias else 2]
    made = [torch.randn(shape, generator=generator).to(dtype).requires_grad_() for shape in shapes]
    labels = torch.randint(V, (B, L), generator=generator)
    labels[0, :5] = labels[2, -1] = -100
    return made, labels


def mixed(on: bool) -> contextlib.AbstractContextManager[Any]:
    return torch.autocast("cpu", torch.bfloat16, enabled=on)


def relative(found: Tensor, wanted: Tensor) -> float:
    return float((found - wanted).norm() / wanted.norm())


@pytest.mark.parametrize("name", DTYPES)
@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("shift", [False, True])
def test_loss_and_gradients_are_those_of_transformers(name: str, bias: bool, shift: bool) -> None:
    """1e-6 in fp32, where only the order of sums differs; 1e-2 in bf16. Gradients of three times the loss."""
    dtype, autocast = DTYPES[name]
    inputs, labels = problem(dtype, bias=bias)
    with mixed(autocast):
        logits = F.linear(*inputs)
        own = ForCausalLMLoss(logits, labels, V, shift_labels=None if shift else labels)
        ours = linear_cross_entropy(inputs[0], inputs[1], labels, *inputs[2:], shift=shift)
    assert ours.dtype == torch.float32
    assert ours.item() == pytest.approx(own.item(), rel=1e-6)
    for found, wanted in zip(*(torch.autograd.grad(3 * loss, inputs) for loss in (ours, own)), strict=True):
        assert found.dtype == wanted.dtype
        assert relative(found, wanted) < (1e-6 if name == "fp32" else 1e-2)


def test_the_sum_over_many_chunks_is_not_rounded_in_bf16() -> None:
    """Of 63 chunks: 3.7e-3 off the fp64 one, transformers' own 3.1e-3; added up in bf16 dW would be 8.9e-3 off."""
    generator = torch.Generator().manual_seed(0)
    h, w = torch.randn(1, 504, 8, generator=generator), torch.randn(504, 8, generator=generator)
    labels = torch.randint(504, (1, 504), generator=generator)
    assert chunk_rows(504, *w.shape, trained=True) == 8
    exact = w.bfloat16().double().requires_grad_()
    linear_cross_entropy(h.bfloat16().double(), exact, labels).backward()
    rough = w.bfloat16().requires_grad_()
    linear_cross_entropy(h.bfloat16(), rough, labels).backward()
    assert exact.grad is not None
    assert rough.grad is not None
    assert relative(rough.grad.double(), exact.grad) < 4e-3


def test_gradcheck_in_fp64() -> None:
    inputs, labels = problem(torch.float64, bias=True)
    small = [inputs[0][:, :4, :6], inputs[1][:19, :6], inputs[2][:19]]
    leaves = [x.detach().clone().requires_grad_() for x in small]
    target = labels[:, :4].where(labels[:, :4] == -100, labels[:, :4] % 19)
    assert (target == -100).any()
    assert chunk_rows(12, 19, 6, trained=True) == 3, "four chunks"
    for wanted in itertools.product((False, True), repeat=3):
        if any(wanted):
            use = [x.requires_grad_(on) for x, on in zip(leaves, wanted, strict=True)]
            assert torch.autograd.gradcheck(
                lambda h, w, b: linear_cross_entropy(h, w, target, b, shift=True), use, fast_mode=True
            )


def test_gradients_add_up_over_micro_batches() -> None:
    inputs, labels = problem(torch.float32)
    for part in range(B):
        loss = linear_cross_entropy(inputs[0][part : part + 1], inputs[1], labels[part : part + 1], count=L)
        (loss * 0.5).backward()
    whole = [x.detach().clone().requires_grad_() for x in inputs]
    (linear_cross_entropy(whole[0], whole[1], labels, count=L) * 0.5).backward()
    for x, y in zip(inputs, whole, strict=True):
        assert x.grad is not None
        assert y.grad is not None
        assert relative(x.grad, y.grad) < 1e-6


def test_a_batch_without_any_label_has_a_loss_of_0_with_a_graph() -> None:
    """Where transformers has 0/0; an engine that gathers weights needs the backward pass on every rank."""
    inputs, labels = problem(torch.float32)
    loss = linear_cross_entropy(*inputs, torch.full_like(labels, -100), shift=True)
    assert loss.item() == 0
    loss.backward()
    for x in inputs:
        assert x.grad is not None
        assert not x.grad.any()


def test_shapes_that_do_not_fit_are_refused() -> None:
    inputs, labels = problem(torch.float32)
    with pytest.raises(ValueError, match=r"labels: have shape \[3, 16\], and hidden states \[3, 17, 32\]"):
        linear_cross_entropy(*inputs, labels[:, :-1])


def test_in_fp16_a_sum_over_many_rows_stays_finite_until_it_is_a_mean() -> None:
    """4096 rows of 20 sum up to 81920 > 65504; their mean is about as large as a row."""
    h, labels = torch.full((1, 4096, 8), 20.0).half(), torch.zeros(1, 4096, dtype=torch.int64)
    made = [torch.zeros(16, 8, dtype=dtype, requires_grad=True) for dtype in (torch.float16, torch.float32)]
    for weight in made:
        linear_cross_entropy(h.to(weight.dtype), weight, labels).backward()
    narrow, wide = (weight.grad for weight in made)
    assert narrow is not None
    assert wide is not None
    assert relative(narrow.float(), wide) < 1e-3


def test_what_a_row_without_a_label_holds_counts_nowhere() -> None:
    """Padding may be NaN: transformers' loss is finite then too."""
    inputs, labels = problem(torch.float32, bias=True)
    wanted = torch.autograd.grad(loss := linear_cross_entropy(*inputs[:2], labels, inputs[2]), inputs)
    with torch.no_grad():
        inputs[0][labels == -100] = float("nan")
    again = linear_cross_entropy(*inputs[:2], labels, inputs[2])
    assert again.item() == loss.item()
    assert all(map(torch.equal, torch.autograd.grad(again, inputs), wanted))


@pytest.mark.parametrize("name", DTYPES)
def test_no_tensor_is_as_large_as_the_logits(name: str) -> None:
    """Of 1024 tokens and a vocabulary of 64 times the width: the chunk's logits are as many numbers as h."""
    dtype, autocast = DTYPES[name]
    tokens, width = 1024, 32
    h = torch.randn(1, tokens, width).to(dtype).requires_grad_()
    w = torch.randn(64 * width, width).to(dtype)
    labels = torch.randint(64 * width, (1, tokens))
    with Live() as live, mixed(autocast):
        loss = linear_cross_entropy(h, w, labels)
    narrow = 4 if name == "fp32" else 2
    assert live.largest <= tokens * width * 4 + 4 * tokens, "the chunk in fp32"
    kept, chunk = tokens * width * narrow, tokens * width * (4 if narrow == 4 else 6)
    weight = w.numel() * 2 if autocast else 0
    assert live.peak == pytest.approx(kept + chunk + weight, rel=0.2), "labels and a number a row besides"
    with Live() as live:
        loss.backward()
    assert live.largest <= tokens * width * h.element_size()


@pytest.mark.parametrize("name", FAMILIES)
@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
def test_models_return_their_loss_and_train_alike_without_logits(name: str, dtype: str) -> None:
    """Also in evaluation; a tied table gets its head's gradient too, and T5's scale lies before its head."""
    cfg = read(name, dtype=dtype)
    whole, inputs = make(cfg), batch(cfg)
    chunked = chunk_loss(make(cfg))
    assert list(chunked.state_dict()) == list(whole.state_dict())
    assert chunk_loss(chunked) is chunked
    outs = [model(**inputs) for model in (whole, chunked)]
    assert outs[1].logits is None
    assert "logits" not in outs[1]
    assert outs[1].loss.item() == pytest.approx(outs[0].loss.item(), rel=2e-6)
    for out in outs:
        out.loss.backward()
    for (key, p), q in zip(whole.named_parameters(), chunked.parameters(), strict=True):
        assert relative(q.grad, p.grad) < (2e-6 if dtype == "fp32" else 2e-2), key
    with torch.no_grad():
        assert chunked.eval()(**inputs).loss.item() == pytest.approx(whole.eval()(**inputs).loss.item(), rel=2e-6)
    plain = {key: value for key, value in inputs.items() if key != "labels"}
    if cfg.objective == "seq2seq":
        plain["decoder_input_ids"] = plain["input_ids"]
    assert torch.equal(chunked(**plain).logits, whole(**plain).logits), "without labels as it was"


def test_what_the_trainer_of_hugging_face_passes() -> None:
    cfg = read("llama_tiny")
    whole, chunked, inputs = make(cfg), chunk_loss(make(cfg)), batch(cfg)
    shifted = F.pad(inputs["labels"], (0, 1), value=-100)[:, 1:].contiguous()
    for extra in ({"num_items_in_batch": torch.tensor(31)}, {"shift_labels": shifted}, {"return_dict": False}):
        found, wanted = (model(**inputs, **extra)[0] for model in (chunked, whole))
        assert found.item() == pytest.approx(wanted.item(), rel=1e-6), extra


def test_generation_is_untouched() -> None:
    cfg = read("llama_tiny")
    ids = batch(cfg, padding=0)["input_ids"]
    texts = [m.eval().generate(ids, max_new_tokens=4, do_sample=False) for m in (make(cfg), chunk_loss(make(cfg)))]
    assert torch.equal(*texts)


def test_other_models_are_refused_by_name() -> None:
    with pytest.raises(ValueError, match=r"train.loss=chunked: is for llama, gpt2, t5, not for bert"):
        chunk_loss(make(read("bert_tiny")))
    with pytest.raises(ValueError, match=r"not for Linear"):
        chunk_loss(nn.Linear(2, 2))


@pytest.mark.parametrize("first", ["adapter", "loss"])
def test_a_head_with_an_adapter_or_another_head_is_refused_whichever_comes_first(first: str) -> None:
    """Only W of the head is read, so the adapter would neither count nor be trained."""
    from llmsys.lorafa import LoRAFAConfig, inject

    model, config = make(read("llama_tiny")), LoRAFAConfig(r=2, targets=("q_proj", "lm_head"))
    if first == "loss":
        chunk_loss(model)
    inject(model, config)
    with pytest.raises(ValueError, match=r"train.loss=chunked: the head has an adapter; leave it out, or use"):
        chunk_loss(model) if first == "adapter" else model(**batch(read("llama_tiny")))
    if first == "loss":
        model.lm_head = nn.Linear(model.lm_head.in_features, model.lm_head.out_features, bias=False)
        with pytest.raises(ValueError, match=r"the model has got another head; call chunk_loss again"):
            model(**batch(read("llama_tiny")))
