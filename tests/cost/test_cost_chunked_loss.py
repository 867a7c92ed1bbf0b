"""A chunked loss costs what is predicted: bytes kept, bytes for a moment, and arithmetic."""

import itertools

import pytest
import torch
from cost_harness import FULL, LOCAL, autocast, batch, build, case, counted_flops, method, saved_bytes, shape, training

from llmsys import schema
from llmsys.cost import estimate, peak_bytes, step_flops
from llmsys.cost.memory import ledger
from llmsys.models import chunk_loss
from llmsys.models.linear_cross_entropy import linear_cross_entropy
from llmsys.profile.live import Live

FAMILIES = ("llama", "gpt2", "t5")
DTYPES = [("fp32", "fp32"), ("bf16", "bf16"), ("fp32", "bf16")]


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize(("dtype", "precision"), DTYPES)
def test_saved_bytes_and_flops_are_as_predicted(family: str, dtype: str, precision: str) -> None:
    """To 4 bytes, a scalar, and exactly; the head's products are those of the whole loss, only earlier."""
    model, train = shape(family, num_layers=1, dtype=dtype), training(precision=precision, loss="chunked")
    for kind in ("full", "lora_peft", "lorafa_peft"):
        how = method(kind)
        built, inputs = chunk_loss(build(model, train, how)), batch(model, train, False)
        measured = saved_bytes(built, inputs, autocast(model, train))
        parts = ledger(case(model, train, how, padded=False))
        assert abs(parts.kept + parts.logits - measured) <= 4, kind
        counted = counted_flops(built, inputs, autocast(model, train))
        assert step_flops(model, train, how, LOCAL, padded=False) == counted, kind
        assert step_flops(model, training(precision=precision), how, LOCAL, padded=False) == counted, kind


@pytest.mark.parametrize(("dtype", "precision"), DTYPES)
@pytest.mark.parametrize("kind", ["full", "lorafa_peft"])
def test_what_the_loss_needs_for_a_moment_is_as_predicted(dtype: str, precision: str, kind: str) -> None:
    """Both passes of the function alone, beside its input; 2 % are labels and a few numbers a row, left out."""
    model = shape(dtype=dtype, vocab_size=3000, hidden_size=256)
    train = training(precision=precision, loss="chunked")
    width = torch.bfloat16 if dtype == "bf16" else torch.float32
    h = torch.randn(2, 96, 256).to(width).requires_grad_()
    w = torch.randn(3000, 256).to(width).requires_grad_(kind == "full")
    with Live() as live:
        with autocast(model, train):
            loss = linear_cross_entropy(h, w, torch.randint(3000, (2, 96)), shift=True)
        forward = live.peak + h.nbytes
        live.peak = live.now
        loss.backward()
    parts = ledger(case(model, train, method(kind)))
    assert parts.logits + parts.fleeting == pytest.approx(max(forward, live.peak), rel=0.02)


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize(("dtype", "precision"), DTYPES)
def test_the_peak_of_a_step_is_as_predicted(family: str, dtype: str, precision: str) -> None:
    """Within 2 % of the live bytes of forward and backward pass, where the vocabulary is what they are about."""
    model, train = shape(family, num_layers=2, dtype=dtype, vocab_size=3000), training(precision=precision)
    peaks = {}
    for loss in ("whole", "chunked"):
        train.loss = loss
        built, inputs = build(model, train, FULL), batch(model, train, False)
        with Live() as live:
            with autocast(model, train):
                value = (chunk_loss(built) if loss == "chunked" else built)(**inputs).loss
            value.backward()
        peaks[loss] = live.peak
    held = estimate(model, train, FULL, LOCAL, padded=False)
    predicted = peak_bytes(model, train, FULL, LOCAL, padded=False) - held["weights"] - held["optimizer"]
    assert predicted == pytest.approx(peaks["chunked"], rel=0.02)
    assert peaks["chunked"] < peaks["whole"]
    assert live.largest < 4 * 2 * 40 * 3000 * 4, "of 80 or 192 tokens no logits; the largest is the table's gradient"


def test_of_a_large_vocabulary_the_logits_were_most_of_the_peak() -> None:
    """Llama-3-8B's shape, LoRA-FA, 8 x 1024 tokens: 4.2 GB of log-probabilities become 67 MB of dh."""
    model = schema.Transformer(
        vocab_size=128256, hidden_size=4096, intermediate_size=14336, num_layers=32, num_heads=32, num_kv_heads=8,
        max_length=8192, dtype="bf16",
    )  # fmt: skip
    found = {}
    for loss, recompute in itertools.product(("whole", "chunked"), ("none", "block")):
        train = schema.Train(
            micro_batch=8, global_batch=8, length=1024, precision="bf16", loss=loss, recompute=recompute
        )
        parts = (model, train, method("lorafa_peft", r=8), LOCAL)
        found[loss, recompute] = estimate(*parts, device="cuda")["logits"], peak_bytes(*parts, device="cuda")
    assert found["whole", "none"][0] == 8192 * 128256 * 4 + 8192 * 8
    assert found["chunked", "none"][0] == 8192 * 4096 * 2
    for recompute in ("none", "block"):
        assert found["whole", recompute][1] - found["chunked", recompute][1] > 10e9
