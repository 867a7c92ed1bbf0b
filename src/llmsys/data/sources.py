"""A data set by its kind: read, checked and split, before any tokenizer or model is loaded.

`code_lm`, `code_docstrings`, `code_packages`   cut from the pinned corpus, see `code`
`synthetic`                                     text of a seeded Markov chain: nothing to read, a loss that can fall
`synthetic_pairs`                               the same as prompts and answers, as long as Alpaca's
`jsonl`                                         Alpaca's format: instruction, input, output
`hub`                                           a folder of the `datasets` library, or a hub id, see `hub`
`digits`, `cifar10`                             images, see `images`

Both splits are shuffled once, always the same way, so that `max_train` and `max_val` take a fair sample.
"""

from __future__ import annotations

import math
import random
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

from llmsys import schema
from llmsys.data import blocks, code, corpus, hub, images, rows
from llmsys.data.examples import Example, Pair, Source, by_content, digest, sample, template
from llmsys.schema.data import OBJECTIVES

SYNTHETIC_CHARACTERS = 512
"""Length of one synthetic example."""
ALPACA_MEDIAN, ALPACA_SIGMA = 118, 0.44
"""Tokens of an Alpaca example, template included, as a log-normal distribution. Two facts fix it: 256 tokens are enough
for 96 % of the data (`CUTOFF_LEN` of alpaca-lora); and its 52,002 rows hold 47.8 MB, each example twice, once in the
template (the data set's card), which makes 530 characters, some 130 tokens, on average."""


def open(cfg: schema.Data, objective: str | None = None, seed: int = 0) -> Source[Any]:
    """Reads, checks and splits a data set for `objective`: one that its kind serves (None: the first of these).

    `seed` chooses the chain of `synthetic`; the others are the same for every seed, so that runs over seeds compare.
    Raises ValueError, one line, for a missing or malformed file, a corpus that is not the pinned one, a label that
    has no functions, and an empty split; LookupError for a library or a hub id that this machine does not have.
    """
    if objective is None:
        objective = "classification" if cfg.kind == "hub" and "label" in cfg.columns else OBJECTIVES[cfg.kind][0]
    if cfg.kind in images.READERS:
        return images.open(cfg)
    labels = tuple(cfg.labels) if objective == "classification" else ()
    if cfg.kind == "hub":
        train, val, labels = hub.read(cfg, objective)
    else:
        readers: dict[str, Callable[[], Pair]] = {
            "code_lm": lambda: code.lm(cfg),
            "code_docstrings": lambda: code.docstrings(cfg, objective),
            "code_packages": lambda: code.packages(cfg),
            "synthetic": lambda: by_content(_synthetic(cfg.num_examples, seed), cfg.val_percent),
            "synthetic_pairs": lambda: by_content(_pairs(cfg.num_examples, seed), cfg.val_percent),
            "jsonl": lambda: by_content(_alpaca(cfg, objective), cfg.val_percent),
        }
        train, val = readers[cfg.kind]()
    train = [train[i] for i in sample(len(train), cfg.max_train)]
    val = [val[i] for i in sample(len(val), cfg.max_val)]
    for name, split in (("training", train), ("validation", val)):
        if not split:
            raise ValueError(
                f"data.kind={cfg.kind}: the {name} split is empty ({len(train) + len(val)} examples in all); "
                f"give more data or another data.val_percent (now {cfg.val_percent})"
            )
    return Source(objective, train, val, labels, digest(objective, labels, train, val))


def content_hash(cfg: schema.Data) -> str:
    """A cheap hash of what a run reads from this machine, for the run's id: that of the files' content, the pinned one
    for the corpus and the digits, a hub id as it is, "" where nothing is read. Raises ValueError when the path is
    missing."""
    if cfg.kind in ("synthetic", "synthetic_pairs"):
        return ""
    if cfg.kind == "jsonl":
        return blocks.file_hash(_existing(cfg))
    if cfg.kind == "hub":
        return hub.content_hash(cfg)
    if cfg.kind in images.READERS:
        return images.content_hash(cfg)
    return corpus.HASH


def _pairs(num_examples: int, seed: int) -> Iterable[Example]:
    """One letter is one token of bytes. Half of an example is its prompt: how Alpaca's are divided is not known here,
    and a step over rows of `train.length` takes as long whatever it is."""
    rng = random.Random(f"lengths {seed}")
    for example in _synthetic(num_examples, seed):
        tokens = min(max(round(rng.lognormvariate(math.log(ALPACA_MEDIAN), ALPACA_SIGMA)), 8), SYNTHETIC_CHARACTERS)
        text = example.text[:tokens]
        yield Example(text[tokens // 2 :], prompt=text[: tokens // 2], origin=example.origin)


def _synthetic(num_examples: int, seed: int) -> Iterable[Example]:
    """Each letter has two likely successors (0.7 and 0.2; otherwise any): an entropy of 1.4 of 4.8 bits per letter,
    so the loss has a known way to fall."""
    rng = random.Random(f"synthetic {seed}")
    letters = "abcdefghijklmnopqrstuvwxyz ."
    likely = {letter: rng.sample(letters, 2) for letter in letters}
    for i in range(num_examples):
        letter, text = rng.choice(letters), []
        for _ in range(SYNTHETIC_CHARACTERS):
            text.append(letter)
            draw = rng.random()
            letter = likely[letter][draw >= 0.7] if draw < 0.9 else rng.choice(letters)
        yield Example("".join(text), origin=f"synthetic:{i}")


def _existing(cfg: schema.Data) -> Path:
    assert cfg.path is not None, "the schema asks for it"
    path = Path(cfg.path)
    if not path.is_file():
        raise ValueError(f"data.path={cfg.path}: no such file (from {Path.cwd()})")
    return path


def _alpaca(cfg: schema.Data, objective: str) -> Iterable[Example]:
    """The template is the prompt of a causal LM and, after `data.prefix`, the source of an encoder."""
    before = cfg.prefix if objective == "seq2seq" else ""
    path = _existing(cfg)
    for where, row in rows.json_lines(path):
        fields = {"instruction": row.get("instruction"), "input": row.get("input", ""), "output": row.get("output")}
        for key, value in fields.items():
            if not isinstance(value, str):
                fault = f"is {type(value).__name__}, not text" if key in row else "is missing"
                raise ValueError(f"{where}: {key!r} {fault}; a line holds instruction, input (may be empty), output")
        yield Example(fields["output"], prompt=before + template(fields["instruction"], fields["input"]), origin=where)
