"""What every reader of a data set returns: examples before tokens, on two sides, and how they are split and hashed."""

from __future__ import annotations

import hashlib
import json
import random
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Generic, TypeVar

import numpy as np

from llmsys.data import corpus


@dataclass(frozen=True, slots=True)
class Example:
    """Causal LM: `prompt` is conditioned on and carries no loss, `text` carries it; without a prompt, examples are
    packed. seq2seq: `prompt` is the encoder's side, `text` the decoder's. Classification: `text`, where there are two
    texts `pair`, and `label` as an index into the source's labels. `origin` is the module, or the line, that the
    example comes from."""

    text: str
    prompt: str = ""
    label: int = -1
    origin: str = ""
    pair: str | None = None


@dataclass(frozen=True)
class Pixels:
    """Images as they are stored: `images` uint8 [N, C, H, W], `classes` int64 [N]. Bytes, because CIFAR-10 in fp32
    would take 737 MB; they become numbers batch by batch. `mean` and `std` are those of the training split, per
    channel, with a pixel between 0 and 1."""

    images: np.ndarray
    classes: np.ndarray
    mean: tuple[float, ...]
    std: tuple[float, ...]

    def __len__(self) -> int:
        return len(self.classes)


Split = TypeVar("Split", list[Example], Pixels)
Pair = tuple[list[Example], list[Example]]
"""(training, validation)."""


@dataclass(frozen=True)
class Source(Generic[Split]):
    """A data set before tokens. `hash` covers every example, its side of the split and its label: two records compare
    only if theirs are equal. `augment`: training images are to be cropped and mirrored."""

    objective: str
    train: Split
    val: Split
    labels: tuple[str, ...]
    hash: str
    augment: bool = False


def template(instruction: str, context: str) -> str:
    """The prompt of an instruction pair: Alpaca's three headings, the middle one only where there is an input."""
    given = f"### Input:\n{context}\n\n" if context else ""
    return f"### Instruction:\n{instruction}\n\n{given}### Response:\n"


def by_content(examples: Iterable[Example], percent: int) -> Pair:
    """Split by hash of the content, so that equal examples are on the same side."""
    keyed = [("\0".join((e.prompt, e.text, *([] if e.pair is None else [e.pair]))), e) for e in examples]
    held_out = corpus.choose({key: 1 for key, _ in keyed}, percent)
    return [e for key, e in keyed if key not in held_out], [e for key, e in keyed if key in held_out]


def sample(n: int, cap: int) -> list[int]:
    """The numbers below `n` in one fixed random order, the first `cap` of them (0: all)."""
    order = list(range(n))
    random.Random(0).shuffle(order)
    return order[:cap] if cap else order


def digest(objective: str, labels: tuple[str, ...], train: list[Example], val: list[Example]) -> str:
    """The hash of a source of texts."""
    sha = hashlib.sha256(json.dumps([objective, labels, len(train), len(val)]).encode())
    for example in (*train, *val):
        for part in (example.text, example.prompt, str(example.label), example.pair):
            if part is not None:
                content = part.encode("utf-8", "surrogatepass")
                sha.update(f"{len(content)}\0".encode() + content)
    return sha.hexdigest()


def pixel_digest(labels: tuple[str, ...], train: Pixels, val: Pixels) -> str:
    """The hash of a source of images."""
    sha = hashlib.sha256(json.dumps(["images", labels, train.images.shape, val.images.shape]).encode())
    for split in (train, val):
        sha.update(split.images.tobytes())
        sha.update(split.classes.astype("<i8").tobytes())
    return sha.hexdigest()
