"""Examples as tensors: tokens kept flat in one int32 array, batches cut out of it on demand.

Shapes: B batch, L length. `labels` stand at the place of the token they name, as Hugging Face has it: the model, not
the data, shifts them by one. -100 means no loss.

Without prompts (`code_lm`, `synthetic`) texts are packed: <bos> text <eos> <bos> text ..., cut every L tokens, so that
no position is wasted on padding. With prompts each example is a row of its own: <bos> prompt text <eos>, padded on the
right, loss on text and <eos> only. Source and target of seq2seq are in `pairs`, images in `pixels`.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

import numpy as np
import torch

from llmsys import schema
from llmsys.data.examples import Example, Source
from llmsys.data.ragged import FULL, IGNORE, Ragged
from llmsys.data.tokenizer import Tokenizer

_TAIL = 24
"""Tokens kept of a cut prompt's end, so that "### Response:" is still there, in bytes too."""


class Split(Protocol):
    """What training and evaluation ask of a split, whatever it is made of."""

    lengths: np.ndarray
    """What each example costs, in tokens without padding; evaluation sorts by it."""

    def __len__(self) -> int: ...

    def batch(
        self, indices: list[int], pad_to: int | None = FULL, seed: int | tuple[int, ...] | None = None
    ) -> dict[str, torch.Tensor]:
        """The arguments of the model's forward for these examples, on the host.

        `pad_to`: the width of texts; by default the encoded length, so that every step has one shape; None: the longest
        of this batch. `seed`: what augmentation is drawn from, together with each example's index; None: no
        augmentation.
        """
        ...


class Encoded:
    """One split of texts. Row `i` of `flat` are tokens, of which the first `prompts[i]` carry no loss."""

    def __init__(
        self,
        rows: Ragged,
        *,
        length: int,
        pad_id: int,
        prompts: np.ndarray | None = None,
        classes: np.ndarray | None = None,
    ) -> None:
        self.rows, self.prompts, self.classes = rows, prompts, classes
        self.length, self.pad_id = length, pad_id
        self.lengths = rows.lengths

    def __len__(self) -> int:
        return len(self.lengths)

    def batch(
        self, indices: list[int], pad_to: int | None = FULL, seed: int | tuple[int, ...] | None = None
    ) -> dict[str, torch.Tensor]:
        """`input_ids` [B, L], `labels` [B, L] or, for classes, [B]; `attention_mask` [B, L] where a row is padded and
        always for classes. L is the encoded length, or `pad_to`; None: the longest row of this batch. There is nothing
        to draw from `seed`."""
        ids, mask = self.rows.padded(indices, self.length if pad_to == FULL else pad_to, self.pad_id)
        batch = {"input_ids": torch.from_numpy(ids)}
        if self.classes is not None or not mask.all():
            batch["attention_mask"] = torch.from_numpy(mask.astype(np.int64))
        if self.classes is not None:
            batch["labels"] = torch.from_numpy(self.classes[indices])
            return batch
        if self.prompts is not None:
            mask &= np.arange(ids.shape[1]) >= self.prompts[indices][:, None]
        batch["labels"] = torch.from_numpy(np.where(mask, ids, IGNORE))
        return batch


@dataclass(frozen=True)
class Dataset:
    """Both splits, ready for batches."""

    train: Split
    val: Split


def encode(source: Source, tokenizer: Tokenizer | None, train: schema.Train, model: schema.Model) -> Dataset:
    """A source as `model` takes it: rows of at most `train.length` tokens (and targets of `train.target_length`), or
    images of the model's size. `tokenizer` is None for images.

    Raises ValueError if a split does not fill one packed row, if the tokenizer has no end of text, without which a
    model could not learn to stop, or if images do not fit the model.
    """
    if source.objective == "images":
        from llmsys.data.pixels import images

        assert isinstance(model, schema.ConvNet), "the config's check"
        return Dataset(*images(source, model))
    assert tokenizer is not None
    length = train.length
    if source.objective == "classification":
        return Dataset(*(_classes(split, tokenizer, length) for split in (source.train, source.val)))
    if tokenizer.eos_id is None:
        raise ValueError("model.tokenizer: it has no eos_token, which language modelling needs")
    if length < 4:
        raise ValueError(f"train.length={length}: must be at least 4")
    if source.objective == "seq2seq":
        from llmsys.data.pairs import pairs

        return Dataset(*(pairs(split, tokenizer, length, train.target_length) for split in (source.train, source.val)))
    if any(example.prompt for example in source.train):
        return Dataset(*(_prompted(split, tokenizer, length) for split in (source.train, source.val)))
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
    return Encoded(Ragged(flat[: rows * length], starts), length=length, pad_id=tokenizer.pad_id)


def _prompted(examples: list[Example], tokenizer: Tokenizer, length: int) -> Encoded:
    bos, eos = _ends(tokenizer)
    prompts = tokenizer.encode([example.prompt for example in examples])
    texts = tokenizer.encode([example.text for example in examples])
    rows, prompt_lengths = [], []
    for prompt, text in zip(prompts, texts, strict=True):
        prompt, text = fit(prompt, [*text, *eos], length - len(bos))
        rows.append([*bos, *prompt, *text])
        prompt_lengths.append(len(bos) + len(prompt))
    return Encoded(
        Ragged.of(rows), length=length, pad_id=tokenizer.pad_id, prompts=np.array(prompt_lengths, dtype=np.int64)
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
    """[CLS] text [SEP], the text cut at its end; of two texts, [CLS] a [SEP] b [SEP], the longer one is cut."""
    two = any(example.pair is not None for example in examples)
    room = length - len(tokenizer.wrap([], [] if two else None))
    if room < 1 + two:
        raise ValueError(f"train.length={length}: no room for text beside the tokenizer's special tokens")
    texts = tokenizer.encode([example.text for example in examples])
    if two:
        pairs = tokenizer.encode([example.pair or "" for example in examples])
        fitted = (fit_two(a, b, room) for a, b in zip(texts, pairs, strict=True))
        rows = Ragged.of(tokenizer.wrap(a, b) for a, b in fitted)
    else:
        rows = Ragged.of(tokenizer.wrap(ids[:room]) for ids in texts)
    classes = np.array([example.label for example in examples], dtype=np.int64)
    return Encoded(rows, length=length, pad_id=tokenizer.pad_id, classes=classes)


def fit_two(a: list[int], b: list[int], budget: int) -> tuple[list[int], list[int]]:
    """Two texts cut at their ends to `budget` tokens together, the longer one first, as GLUE is usually cut."""
    a = a[: max(budget - budget // 2, budget - len(b))]
    return a, b[: budget - len(a)]


def _ends(tokenizer: Tokenizer) -> tuple[list[int], list[int]]:
    assert tokenizer.eos_id is not None
    return [] if tokenizer.bos_id is None else [tokenizer.bos_id], [tokenizer.eos_id]
