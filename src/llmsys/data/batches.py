"""Examples as tensors: tokens kept flat in one int32 array, batches cut out of it on demand.

Shapes: B batch, L length. `labels` stand at the place of the token they name, as Hugging Face has it: the model, not
the data, shifts them by one. -100 means no loss.

Without prompts (`code_lm`, `synthetic`) texts are packed: <bos> text <eos> <bos> text ..., cut every L tokens, so that
no position is wasted on padding. With prompts each example is a row of its own: <bos> prompt text <eos>, padded on the
right, loss on text and <eos> only.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

import numpy as np
import torch

from llmsys.data.sources import Example, Source
from llmsys.data.tokenizer import Tokenizer

IGNORE = -100
_FULL = -1
_TAIL = 24
"""Tokens kept of a cut prompt's end, so that "### Response:" is still there, in bytes too."""


class Encoded:
    """One split. Row `i` is `flat[starts[i]:starts[i + 1]]`, of which the first `prompts[i]` tokens carry no loss."""

    def __init__(
        self,
        flat: np.ndarray,
        starts: np.ndarray,
        *,
        length: int,
        pad_id: int,
        prompts: np.ndarray | None = None,
        classes: np.ndarray | None = None,
    ) -> None:
        self.flat, self.starts, self.prompts, self.classes = flat, starts, prompts, classes
        self.length, self.pad_id = length, pad_id
        self.lengths = np.diff(starts)
        """Tokens of each row, padding not counted; evaluation sorts by it."""

    def __len__(self) -> int:
        return len(self.lengths)

    def batch(self, indices: list[int], pad_to: int | None = _FULL) -> dict[str, torch.Tensor]:
        """`input_ids` [B, L], `labels` [B, L] or, for classes, [B]; `attention_mask` [B, L] where a row is padded and
        always for classes. L is the encoded length, or `pad_to`; None: the longest row of this batch."""
        assert indices
        longest = int(self.lengths[indices].max())
        width = longest if pad_to is None else self.length if pad_to == _FULL else pad_to
        assert width >= longest, f"pad_to={width} is shorter than a row of {longest} tokens"
        ids = np.full((len(indices), width), self.pad_id, dtype=np.int64)
        mask = np.zeros((len(indices), width), dtype=np.int64)
        labels = np.full((len(indices), width), IGNORE, dtype=np.int64)
        for row, i in enumerate(indices):
            tokens = self.flat[self.starts[i] : self.starts[i + 1]]
            prompt = 0 if self.prompts is None else self.prompts[i]
            ids[row, : len(tokens)] = tokens
            mask[row, : len(tokens)] = 1
            labels[row, prompt : len(tokens)] = tokens[prompt:]
        batch = {"input_ids": torch.from_numpy(ids)}
        if self.classes is not None or (self.lengths[indices] < width).any():
            batch["attention_mask"] = torch.from_numpy(mask)
        if self.classes is not None:
            labels = self.classes[indices]
        batch["labels"] = torch.from_numpy(labels)
        return batch


@dataclass(frozen=True)
class Dataset:
    """Both splits, ready for batches."""

    train: Encoded
    val: Encoded


def encode(source: Source, tokenizer: Tokenizer, length: int) -> Dataset:
    """Tokens of a source, rows of at most `length`. Raises ValueError if a split does not fill one packed row, or if
    the tokenizer has no end of text, without which a model could not learn to stop."""
    if source.objective == "classification":
        return Dataset(*(_classes(split, tokenizer, length) for split in (source.train, source.val)))
    if tokenizer.eos_id is None:
        raise ValueError("model.tokenizer: it has no eos_token, which causal language modelling needs")
    if length < 4:
        raise ValueError(f"train.length={length}: must be at least 4")
    if any(example.prompt for example in source.train):
        return Dataset(*(_pairs(split, tokenizer, length) for split in (source.train, source.val)))
    splits = []
    for name, split in (("training", source.train), ("validation", source.val)):
        packed = _packed(split, tokenizer, length)
        if not len(packed):
            raise ValueError(f"train.length={length}: the {name} split is shorter than one sequence of that length")
        splits.append(packed)
    return Dataset(*splits)


def _packed(examples: list[Example], tokenizer: Tokenizer, length: int) -> Encoded:
    """The rest that does not fill a row is left out."""
    bos, eos = _ends(tokenizer)
    pieces = []
    for i in range(0, len(examples), 64):  # arrays early: a list of 16 million ints would take 130 MB
        for ids in tokenizer.encode([example.text for example in examples[i : i + 64]]):
            pieces.append(np.array([*bos, *ids, *eos], dtype=np.int32))
    flat = np.concatenate(pieces)
    rows = len(flat) // length
    starts = np.arange(rows + 1, dtype=np.int64) * length
    return Encoded(flat[: rows * length], starts, length=length, pad_id=tokenizer.pad_id)


def _pairs(examples: list[Example], tokenizer: Tokenizer, length: int) -> Encoded:
    bos, eos = _ends(tokenizer)
    prompts = tokenizer.encode([example.prompt for example in examples])
    texts = tokenizer.encode([example.text for example in examples])
    rows, prompt_lengths = [], []
    for prompt, text in zip(prompts, texts, strict=True):
        prompt, text = fit(prompt, [*text, *eos], length - len(bos))
        rows.append([*bos, *prompt, *text])
        prompt_lengths.append(len(bos) + len(prompt))
    flat, starts = _flat(rows)
    return Encoded(
        flat, starts, length=length, pad_id=tokenizer.pad_id, prompts=np.array(prompt_lengths, dtype=np.int64)
    )


def fit(prompt: list[int], text: list[int], budget: int) -> tuple[list[int], list[int]]:
    """Prompt and text cut to `budget` tokens together.

    The text, which carries the loss, may always use half, and whatever the prompt leaves; it is cut at its end (and
    then has no <eos>: it has not ended). The prompt is cut in the middle: an instruction and a function's signature
    stand at its beginning, the words that ask for the response at its end.
    """
    text = text[: max(budget // 2, budget - len(prompt))]
    room = budget - len(text)
    if len(prompt) > room:
        tail = min(_TAIL, room // 2)
        prompt = prompt[: room - tail] + prompt[len(prompt) - tail :]
    return prompt, text


def _classes(examples: list[Example], tokenizer: Tokenizer, length: int) -> Encoded:
    """[CLS] text [SEP], the text cut at its end."""
    room = length - len(tokenizer.wrap([]))
    if room < 1:
        raise ValueError(f"train.length={length}: no room for text beside the tokenizer's special tokens")
    tokens = tokenizer.encode([example.text for example in examples])
    flat, starts = _flat(tokenizer.wrap(ids[:room]) for ids in tokens)
    classes = np.array([example.label for example in examples], dtype=np.int64)
    return Encoded(flat, starts, length=length, pad_id=tokenizer.pad_id, classes=classes)


def _ends(tokenizer: Tokenizer) -> tuple[list[int], list[int]]:
    assert tokenizer.eos_id is not None
    return [] if tokenizer.bos_id is None else [tokenizer.bos_id], [tokenizer.eos_id]


def _flat(rows: Iterable[list[int]]) -> tuple[np.ndarray, np.ndarray]:
    arrays = [np.array(row, dtype=np.int32) for row in rows]
    starts = np.zeros(len(arrays) + 1, dtype=np.int64)
    np.cumsum([len(array) for array in arrays], out=starts[1:])
    return np.concatenate(arrays), starts
