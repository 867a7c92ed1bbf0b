"""Quality on the whole validation split. B batch, L length, V vocabulary or classes.

Language modelling: the mean loss over all label tokens, and its exponential, the perplexity. Classification: mean loss,
accuracy with its standard error sqrt(p (1 - p) / n), and macro-F1 (every class counts the same, however rare).
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Callable
from contextlib import AbstractContextManager
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor, nn

from llmsys.errors import NotANumber

if TYPE_CHECKING:
    from llmsys.data import Encoded


def label_count(batch: dict[str, Tensor]) -> int:
    """How many positions a batch's mean loss is over.

    [B] labels: B. [B, L] labels: those not -100, without the first column, which no position predicts.
    """
    labels = batch["labels"]
    return labels.numel() if labels.ndim == 1 else int((labels[:, 1:] != -100).sum())


def token_count(batch: dict[str, Tensor]) -> int:
    """Tokens of a batch that are not padding."""
    mask = batch.get("attention_mask")
    return batch["input_ids"].numel() if mask is None else int(mask.sum())


def autocast(device: torch.device, precision: str, dtype: str) -> AbstractContextManager[object]:
    """Where the weights are fp32 and the precision is bf16, the context that runs matrix products in bf16."""
    if precision == "bf16" and dtype == "fp32":
        return torch.autocast(device.type, torch.bfloat16)
    return contextlib.nullcontext()


def by_length(split: Encoded, batch_size: int) -> list[list[int]]:
    """All rows of a split in batches of like length, which saves most of the padding; the longest first, so that too
    little memory shows at once."""
    rows = np.argsort(-split.lengths, kind="stable").tolist()
    return [rows[i : i + batch_size] for i in range(0, len(rows), batch_size)]


@torch.no_grad()
def evaluate(
    model: nn.Module,
    split: Encoded,
    batch_size: int,
    *,
    device: torch.device,
    mixed: Callable[[], AbstractContextManager[object]],
    beat: Callable[[], None],
) -> dict[str, float]:
    """`val_loss`, and `perplexity` or `accuracy`, `accuracy_se` and `macro_f1`.

    Without dropout; the model is left in the mode in which it was. Draws no random number. NotANumber on a NaN loss.
    """
    training = model.training
    model.eval()
    loss, count = 0.0, 0
    truth: list[int] = []
    guess: list[int] = []
    for indices in by_length(split, batch_size):
        batch = split.batch(indices, pad_to=None)
        labels = label_count(batch)
        if labels == 0:
            continue  # a prompt that fills the whole length: its mean loss would be 0/0
        with mixed():
            out = model(**{key: value.to(device) for key, value in batch.items()})
        loss += float(out.loss) * labels
        count += labels
        if batch["labels"].ndim == 1:
            truth += batch["labels"].tolist()
            guess += out.logits.argmax(-1).tolist()
        beat()
    model.train(training)
    if count == 0:
        raise ValueError("data: the validation split has no label token within train.length; raise train.length")
    loss /= count
    if not math.isfinite(loss):
        raise NotANumber(f"the validation loss is {loss}")
    return {"val_loss": loss, **(scores(truth, guess) if truth else {"perplexity": math.exp(min(loss, 700.0))})}


def scores(truth: list[int], guess: list[int]) -> dict[str, float]:
    """Accuracy, its standard error and macro-F1 over the classes that occur in either list."""
    from sklearn.metrics import f1_score

    accuracy = sum(t == g for t, g in zip(truth, guess, strict=True)) / len(truth)
    return {
        "accuracy": accuracy,
        "accuracy_se": math.sqrt(accuracy * (1 - accuracy) / len(truth)),
        "macro_f1": float(f1_score(truth, guess, average="macro", zero_division=0.0)),
    }
