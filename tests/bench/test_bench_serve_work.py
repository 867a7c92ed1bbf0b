"""Claims about the work of serving: arithmetic is what torch counts, bytes are at least the weights and the cache; and
from passes that are as a fit supposes, the fit is found again."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from serve_harness import outcome
from torch.utils.flop_counter import FlopCounterMode

from llmsys import compose, models, schema
from llmsys.bench.serve import words, work
from llmsys.bench.serve.fit import Point, fit
from llmsys.bench.serve.predict import Batching
from llmsys.bench.serve.share import share


def shape(*overrides: str) -> schema.Transformer:
    model = schema.build(compose.compose(["model=llama_tiny", "model.num_kv_heads=2", *overrides])).model
    assert isinstance(model, schema.Transformer)
    return model


@pytest.mark.parametrize(("batch", "new", "before"), [(1, 7, 0), (3, 16, 0), (1, 1, 5), (4, 1, 31)])
def test_arithmetic_is_what_torch_counts(batch: int, new: int, before: int) -> None:
    """But for attention, which torch counts without a mask: in a prefill all n pairs of each token."""
    cfg = shape("model.attention=eager")
    made = models.load(cfg, objective="causal_lm", num_labels=0, device=torch.device("cpu"), seed=0, folder=None).eval()
    ids = torch.randint(4, cfg.vocab_size, (batch, before + new))
    with torch.inference_mode():
        cache = made(input_ids=ids[:, :before], use_cache=True).past_key_values if before else None
        with FlopCounterMode(display=False) as counter:
            made(input_ids=ids[:, before:], past_key_values=cache, use_cache=True, logits_to_keep=1)
    rows = work.by_row(cfg, batch, new, before)
    masked = 4.0 * cfg.head_width * cfg.num_heads * batch * new * (new - 1) / 2 * cfg.num_layers
    assert counter.get_total_flops() == pytest.approx(work.whole(rows).flops + masked, rel=1e-6)


def test_a_decoding_step_reads_the_weights_once_and_the_cache_of_each_sequence() -> None:
    cfg = shape()
    made = models.load(cfg, objective="causal_lm", num_labels=0, device=torch.device("cpu"), seed=0, folder=None)
    weights = sum(p.numel() * 4 for name, p in made.named_parameters() if p.dim() == 2 and "embed" not in name)
    one, far = (work.whole(work.by_row(cfg, 8, 1, before)).nbytes for before in (0, 100))
    assert far - one == pytest.approx(work.cache_bytes(cfg, 8 * 100))
    assert weights < one < 1.6 * weights


def test_weights_in_four_bits_are_read_in_an_eighth_of_the_bytes_and_their_scales() -> None:
    wide, packed = (work.by_row(shape(*more), 1, 1)["down"].nbytes for more in ([], ["model.quant=nf4"]))
    assert 0.13 < packed / wide < 0.2


def test_a_model_that_generates_nothing_is_refused() -> None:
    cfg = schema.build(compose.compose(["model=bert_tiny", "data=code_packages"])).model
    assert isinstance(cfg, schema.Transformer)
    with pytest.raises(ValueError, match="model=bert_tiny: generates no text"):
        work.by_row(cfg, 1, 1)


@pytest.mark.parametrize("slow", [3.0, 0.0])
def test_a_fit_is_found_again_and_holds_between_batches(slow: float) -> None:
    """Of passes that are as it supposes."""

    def took(batch: int, least: float) -> float:
        return 0.002 * batch + slow * (least - 1e-4 * batch)

    points = [Point(b, 1e-4 * b, took(b, 1e-4 * b)) for b in (1, 4, 16)] + [Point(4, 5e-3, took(4, 5e-3))]
    own = fit(points)
    assert own.slow == pytest.approx(slow)
    for batch, least in ((1, 2e-3), (16, 3e-2), (8, 4e-3)):
        assert own.seconds(batch, least) == pytest.approx(took(batch, least))


def test_longer_contexts_are_never_predicted_to_be_quicker() -> None:
    assert fit([Point(1, 1e-3, 0.02), Point(1, 2e-3, 0.01)]).slow == 0.0
    with pytest.raises(ValueError, match="two passes of one batch"):
        fit([Point(1, 1e-3, 0.02), Point(2, 2e-3, 0.01)])


def test_the_share_of_one_request_alone_is_its_passes_over_its_time() -> None:
    cfg = shape()
    alone = outcome(tokens=(0.5, 1.0, 1.5), sent=0.25, input=10)
    passes = work.whole(work.by_row(cfg, 1, 10)).nbytes + 2 * work.whole(work.by_row(cfg, 1, 1, 12)).nbytes
    assert share([alone], cfg, None) == pytest.approx(passes / 1.25)
    assert share([alone], cfg, Batching(static=True, sequences=1, tokens=0)) == pytest.approx(passes / 1.25)


def test_those_that_are_served_together_read_the_weights_once_and_are_not_charged_twice() -> None:
    """A lower bound is of the fewest passes that there can be: 64 prompts in one, or in four of 16 sequences."""
    cfg, many = shape(), 64
    weights = work.whole(work.by_row(cfg, 0, 1)).nbytes
    loads = [outcome(at, tokens=(1.0, 2.0), sent=0.0, input=10) for at in range(many)]
    once = many * (
        work.whole(work.by_row(cfg, 1, 10)).nbytes + work.whole(work.by_row(cfg, 1, 1, 11)).nbytes - 2 * weights
    )
    for how, passes in (
        (None, 2),  # one that reads, one that decodes
        (Batching(sequences=64, tokens=64 * 10), 2),
        (Batching(sequences=64, tokens=64), 10),
        (Batching(static=True, sequences=64, tokens=0), 2),
        (Batching(static=True, sequences=16, tokens=0), 4 + 1),  # as they say that all were under way at a time
    ):
        assert share(loads, cfg, how) == pytest.approx((once + passes * weights) / 2.0), how


def test_a_server_that_waits_for_requests_has_not_read_its_weights_more_often() -> None:
    """Two at a time, and nobody for ten seconds: each step of theirs is one pass."""
    cfg = shape()
    at_once = [outcome(at, tokens=(1.0, 2.0, 3.0), sent=0.0) for at in range(2)]
    later = [outcome(at, tokens=(11.0, 12.0, 13.0), sent=10.0) for at in range(2, 4)]
    one, both = share(at_once, cfg, None) * 3, share([*at_once, *later], cfg, None) * 13
    weights = work.whole(work.by_row(cfg, 0, 1)).nbytes
    assert both == pytest.approx(2 * one - weights)  # a prompt may be read with what the others decode


def test_quantised_weights_are_as_large_as_they_are_loaded() -> None:
    for quant in ("none", "nf4", "int8"):
        cfg = shape(f"model.quant={quant}")
        made = models.load(cfg, objective="causal_lm", num_labels=0, device=torch.device("cpu"), seed=0, folder=None)
        held = sum(each.numel() * each.element_size() for each in made.parameters())
        scales = sum(
            each.numel() * each.element_size() for name, each in made.named_buffers() if "inv_freq" not in name
        )
        assert work.weight_bytes(cfg) == pytest.approx(held + scales, rel=0.02), quant


def test_a_text_of_words_has_as_many_tokens_as_ids(tmp_path: Path) -> None:
    from transformers import AutoTokenizer

    words.write(tmp_path, 300)
    read = AutoTokenizer.from_pretrained(tmp_path)
    ids = [4, 299, 17, 17, 5]
    assert read(words.text(ids))["input_ids"] == ids
    assert len(read.decode(ids).split("t")) == 6
