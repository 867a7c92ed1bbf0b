"""Quality on the whole validation split. B batch, L length, V vocabulary or classes.

Language modelling, also seq2seq: the mean loss over all label tokens, and its exponential, the perplexity; seq2seq with
a tokenizer also BLEU and ROUGE of what the model generates (`generation`). Classes and images: mean loss, accuracy with
its standard error sqrt(p (1 - p) / n), and macro-F1 (every class counts the same, however rare).

Ranks share the batches: rank r of n takes batches r, r + n, r + 2n, ... Where weights are cut over the ranks, a forward
pass gathers them, so every rank must make the same number of passes: one that runs out repeats its last batch, which
then counts nothing. What is summed over the ranks are sums, so n ranks give what one gives.
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from typing import TYPE_CHECKING, Protocol

import numpy as np
import torch
from torch import Tensor, nn

from llmsys.errors import NotANumber

if TYPE_CHECKING:
    from llmsys.data import Split
    from llmsys.data.tokenizer import Tokenizer

CLASSES = ("classification", "images")
"""Objectives with one label per example."""


class Ranks(Protocol):
    """What evaluation asks of an engine."""

    data_rank: int
    data_world: int

    def sum(self, values: Tensor) -> Tensor:
        """fp64 [n], summed over the ranks that have different data."""
        ...


def label_count(batch: dict[str, Tensor], objective: str) -> int:
    """How many positions a batch's mean loss is over.

    Classes and images: B. seq2seq: the labels [B, T] that are not -100. Causal LM: those of [B, L] without the first
    column, which no position predicts.
    """
    labels = batch["labels"]
    if objective in CLASSES:
        return labels.numel()
    return int(((labels if objective == "seq2seq" else labels[:, 1:]) != -100).sum())


def token_count(batch: dict[str, Tensor], objective: str) -> int:
    """Tokens of a batch that are not padding; seq2seq: of source and target; 0 for images."""
    if objective == "images":
        return 0
    mask = batch.get("attention_mask")
    tokens = batch["input_ids"].numel() if mask is None else int(mask.sum())
    return tokens + label_count(batch, objective) if objective == "seq2seq" else tokens


def autocast(device: torch.device, precision: str, dtype: str) -> AbstractContextManager[object]:
    """Where the weights are fp32 and the precision is bf16, the context that runs matrix products in bf16."""
    if precision == "bf16" and dtype == "fp32":
        return torch.autocast(device.type, torch.bfloat16)
    return contextlib.nullcontext()


def by_length(split: Split, batch_size: int, first: int | None = None) -> list[list[int]]:
    """All rows of a split (or the `first` so many) in batches of like length, which saves most of the padding; the
    longest first, so that too little memory shows at once."""
    rows = np.argsort(-split.lengths[:first], kind="stable").tolist()
    return [rows[i : i + batch_size] for i in range(0, len(rows), batch_size)]


def share(batches: list[list[int]], engine: Ranks) -> Iterator[tuple[list[int], bool]]:
    """This rank's batches, and whether each counts; equally many on every rank."""
    rank, world = engine.data_rank, engine.data_world
    mine = batches[rank::world] or batches[:1]
    for i in range(math.ceil(len(batches) / world)):
        yield mine[min(i, len(mine) - 1)], rank + i * world < len(batches)


@torch.no_grad()
def evaluate(
    model: nn.Module,
    split: Split,
    batch_size: int,
    *,
    objective: str,
    engine: Ranks,
    device: torch.device,
    mixed: Callable[[], AbstractContextManager[object]],
    beat: Callable[[], None],
    tokenizer: Tokenizer | None = None,
    generate_max: int = 0,
    target_length: int = 0,
) -> dict[str, float]:
    """`val_loss`, and `perplexity` or `accuracy`, `accuracy_se` and `macro_f1`; the same on every rank.

    seq2seq with a `tokenizer` adds `bleu` and `rouge1`, `rouge2`, `rougeL` of the first `generate_max` examples (0:
    all), each continued to `target_length` tokens at most. `model` may be wrapped by an engine: only its forward is
    called. Without dropout; it is left in the mode in which it was. Draws no random number. NotANumber on a NaN loss.
    """
    training = model.training
    model.eval()
    loss, count = 0.0, 0
    matrix = np.zeros((0, 0))
    for indices, counts in share(by_length(split, batch_size), engine):
        batch = split.batch(indices, pad_to=None)
        labels = label_count(batch, objective)
        with mixed():
            out = model(**{key: value.to(device) for key, value in batch.items()})
        if objective in CLASSES and not matrix.size:
            matrix = np.zeros((out.logits.shape[-1],) * 2)
        # Without labels (a prompt that fills the whole length) the mean loss would be 0/0.
        if counts and labels:
            loss += float(out.loss) * labels
            count += labels
            if objective in CLASSES:
                matrix += confusion(batch["labels"], out.logits.argmax(-1).cpu(), len(matrix))
        beat()
    sums = _summed(engine, device, [loss, count, *matrix.flat])
    loss, count, matrix = float(sums[0]), round(sums[1]), sums[2:].reshape(matrix.shape)
    if count == 0:
        raise ValueError("data: the validation split has no label token within train.length; raise train.length")
    loss /= count
    if not math.isfinite(loss):
        raise NotANumber(f"the validation loss is {loss}")
    result = {"val_loss": loss}
    if objective in CLASSES:
        result |= from_confusion(matrix)
    else:
        result["perplexity"] = math.exp(min(loss, 700.0))
    if objective == "seq2seq" and tokenizer is not None:
        from llmsys.data.pairs import Pairs
        from llmsys.train import generation

        assert isinstance(split, Pairs)
        sums = np.zeros(generation.SUMS)
        for indices, counts in share(by_length(split, batch_size, generate_max or None), engine):
            batch = split.batch(indices, pad_to=None)
            texts = generation.greedy(model, batch, tokenizer, target_length, engine, device, mixed, beat)
            if counts:
                sums += generation.statistics(texts, [split.references[i] for i in indices])
        result |= generation.scores(_summed(engine, device, list(sums)))
    model.train(training)
    return result


def _summed(engine: Ranks, device: torch.device, values: list[float]) -> np.ndarray:
    return engine.sum(torch.tensor(values, dtype=torch.float64, device=device)).cpu().numpy()


def confusion(truth: Tensor, guess: Tensor, classes: int) -> np.ndarray:
    """[classes, classes] counts: a row for each true class, a column for each guessed."""
    return np.bincount(truth.numpy() * classes + guess.numpy(), minlength=classes**2).reshape(classes, classes)


def from_confusion(matrix: np.ndarray) -> dict[str, float]:
    """Accuracy, its standard error and macro-F1 over the classes that occur, as a truth or as a guess.

    F1 of a class is 2 TP / (2 TP + FP + FN), and 2 TP + FP + FN is its row's sum plus its column's.
    """
    hits, total = np.diag(matrix), matrix.sum()
    occurs = matrix.sum(0) + matrix.sum(1)
    accuracy = float(hits.sum() / total)
    return {
        "accuracy": accuracy,
        "accuracy_se": math.sqrt(accuracy * (1 - accuracy) / total),
        "macro_f1": float((2 * hits[occurs > 0] / occurs[occurs > 0]).mean()),
    }


def scores(truth: list[int], guess: list[int]) -> dict[str, float]:
    """`from_confusion` of two lists of classes."""
    return from_confusion(confusion(torch.tensor(truth), torch.tensor(guess), max(truth + guess) + 1))
