"""What an encoder-decoder writes, and how near it is to the references. B batch, L source, T target length.

Greedy decoding through the model's forward alone, without a cache: the first pass runs the encoder, whose output the
following passes take back as `encoder_outputs`. That is T passes of growing length where `generate()` would make T of
length one, but it is the only way through which every engine's weights are gathered, and the number of passes is the
same on every rank: they stop together, when all have ended.

BLEU is sacrebleu's corpus BLEU (Post 2018, arXiv 1804.08771: tokenizer 13a, smoothing exp), 0 to 100. It is made of
sums over sentences (matching and possible n-grams, lengths), so ranks add those and not their scores. ROUGE is
rouge-score's F, with stemming, as the original script is used; the mean over examples, 0 to 1.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor, nn

if TYPE_CHECKING:
    from llmsys.data.tokenizer import Tokenizer
    from llmsys.train.evaluate import Ranks

ROUGE = ("rouge1", "rouge2", "rougeL")
_ORDER = 4
SUMS = 2 * _ORDER + 2 + len(ROUGE) + 1
"""Length of `statistics`: n-grams that match, n-grams there are, both lengths, the sums of ROUGE, the examples."""


def underlying(model: nn.Module) -> Any:
    """The model inside what engines wrap around it (DDP, DeepSpeed), for its config alone."""
    while isinstance(inner := getattr(model, "module", None), nn.Module):
        model = inner
    return model


@torch.no_grad()
def greedy(
    model: nn.Module,
    batch: dict[str, Tensor],
    tokenizer: Tokenizer,
    target_length: int,
    engine: Ranks,
    device: torch.device,
    mixed: Callable[[], AbstractContextManager[object]],
    beat: Callable[[], None],
) -> list[str]:
    """B texts of at most `target_length` tokens, up to their first </s>. Every rank makes the same number of passes."""
    start = underlying(model).config.decoder_start_token_id
    mask = batch["attention_mask"].to(device)
    source: dict[str, Any] = {"input_ids": batch["input_ids"].to(device)}
    ids = torch.full((len(mask), 1), start, dtype=torch.long, device=device)  # [B, 1 + tokens so far]
    ended = torch.zeros(len(mask), dtype=torch.bool, device=device)
    for _ in range(target_length):
        with mixed():
            out = model(**source, attention_mask=mask, decoder_input_ids=ids, use_cache=False)
        source = {"encoder_outputs": (out.encoder_last_hidden_state,)}
        token = out.logits[:, -1].argmax(-1)
        ids = torch.cat([ids, token[:, None]], dim=1)
        ended |= token == tokenizer.eos_id
        beat()
        if not engine.sum((~ended).sum().double()[None]).item():
            break
    return [tokenizer.decode(_until(row, tokenizer.eos_id)) for row in ids[:, 1:].tolist()]


def _until(ids: list[int], end: int | None) -> list[int]:
    return ids[: ids.index(end)] if end in ids else ids


def statistics(texts: list[str], references: list[str]) -> np.ndarray:
    """fp64 [SUMS] of these texts; the sum over several such lists is that of the list of them all."""
    from rouge_score.rouge_scorer import RougeScorer
    from sacrebleu.metrics import BLEU

    bleu = BLEU(max_ngram_order=_ORDER, force=True).corpus_score(texts, [references])
    scorer = RougeScorer(list(ROUGE), use_stemmer=True)
    found = [scorer.score(reference, text) for text, reference in zip(texts, references, strict=True)]
    rouge = [sum(scores[key].fmeasure for scores in found) for key in ROUGE]
    return np.array([*bleu.counts, *bleu.totals, bleu.sys_len, bleu.ref_len, *rouge, len(texts)], dtype=np.float64)


def scores(sums: np.ndarray) -> dict[str, float]:
    """`bleu`, `rouge1`, `rouge2` and `rougeL` from summed statistics."""
    from sacrebleu.metrics import BLEU

    counts, totals = sums[:_ORDER].astype(int).tolist(), sums[_ORDER : 2 * _ORDER].astype(int).tolist()
    sys_len, ref_len = sums[2 * _ORDER : 2 * _ORDER + 2].astype(int).tolist()
    bleu = BLEU.compute_bleu(counts, totals, sys_len, ref_len, smooth_method="exp")
    rouge = sums[2 * _ORDER + 2 : -1] / sums[-1]
    return {"bleu": float(bleu.score), **dict(zip(ROUGE, rouge.tolist(), strict=True))}
