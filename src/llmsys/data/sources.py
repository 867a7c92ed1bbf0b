"""What the data sets are made of: raw examples, read, checked and split, before any tokenizer or model is loaded.

`code_lm`          the corpus's modules, whole; packed end to end when encoded
`code_docstrings`  a function without its docstring -> the docstring, as instruction pairs
`code_packages`    a function's statements, names of sub-packages made neutral -> the sub-package
`synthetic`        text of a seeded Markov chain: nothing to read, and a loss that can fall
`jsonl`            Alpaca's format: instruction, input, output

Both splits are shuffled once, always the same way, so that `max_train` and `max_val` take a fair sample.
"""

from __future__ import annotations

import hashlib
import json
import random
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path

from llmsys import schema
from llmsys.data import corpus, functions

DOCSTRING_INSTRUCTION = "Write the docstring of this Python function."
SYNTHETIC_CHARACTERS = 512
"""Length of one synthetic example."""


@dataclass(frozen=True, slots=True)
class Example:
    """Causal LM: `prompt` is conditioned on and carries no loss, `text` carries it; without a prompt, examples are
    packed. Classification: `text`, and `label` as an index into the source's labels. `origin` is the module, or the
    line, that the example comes from."""

    text: str
    prompt: str = ""
    label: int = -1
    origin: str = ""


@dataclass(frozen=True)
class Source:
    """A data set before tokens. `hash` covers every example, its side of the split and its label: two records compare
    only if theirs are equal."""

    objective: str
    train: list[Example]
    val: list[Example]
    labels: tuple[str, ...]
    hash: str


def open(cfg: schema.Data, seed: int = 0) -> Source:
    """Reads, checks and splits a data set.

    `seed` chooses the chain of `synthetic`; the others are the same for every seed, so that runs over seeds compare.
    Raises ValueError, one line, for a missing or malformed file, a corpus that is not the pinned one, a label that
    has no functions, and an empty split.
    """
    readers: dict[str, Callable[[], tuple[list[Example], list[Example]]]] = {
        "code_lm": lambda: _code_lm(cfg),
        "code_docstrings": lambda: _code_docstrings(cfg),
        "code_packages": lambda: _code_packages(cfg),
        "synthetic": lambda: _split(_synthetic(cfg.num_examples, seed), cfg.val_percent),
        "jsonl": lambda: _split(_jsonl(_existing(cfg)), cfg.val_percent),
    }
    train, val = readers[cfg.kind]()
    train, val = _sample(train, cfg.max_train), _sample(val, cfg.max_val)
    for name, split in (("training", train), ("validation", val)):
        if not split:
            raise ValueError(
                f"data.kind={cfg.kind}: the {name} split is empty ({len(train) + len(val)} examples in all); "
                f"give more data or another data.val_percent (now {cfg.val_percent})"
            )
    labels = tuple(cfg.labels) if cfg.objective == "classification" else ()
    return Source(cfg.objective, train, val, labels, _hash(cfg.objective, labels, train, val))


def content_hash(cfg: schema.Data) -> str:
    """A cheap hash of what a run reads from this machine, for the run's id: the file's for `jsonl`, the pinned one for
    the corpus, "" where nothing is read. Raises ValueError when the path is missing."""
    if cfg.kind == "jsonl":
        return hashlib.sha256(_existing(cfg).read_bytes()).hexdigest()
    return "" if cfg.kind == "synthetic" else corpus.HASH


def template(instruction: str, context: str) -> str:
    """The prompt of an instruction pair: Alpaca's three headings, the middle one only where there is an input."""
    given = f"### Input:\n{context}\n\n" if context else ""
    return f"### Instruction:\n{instruction}\n\n{given}### Response:\n"


def _code_lm(cfg: schema.Data) -> tuple[list[Example], list[Example]]:
    modules = corpus.modules()
    examples = [Example(module.text, origin=module.path) for module in modules if module.text.strip()]
    return _by_module(examples, modules, cfg.val_percent)


def _code_docstrings(cfg: schema.Data) -> tuple[list[Example], list[Example]]:
    modules = corpus.modules()
    examples = [
        Example(function.doc, prompt=template(DOCSTRING_INSTRUCTION, function.source), origin=function.module)
        for function in functions.load(modules)
        if function.doc
    ]
    return _by_module(examples, modules, cfg.val_percent)


def _code_packages(cfg: schema.Data) -> tuple[list[Example], list[Example]]:
    modules = corpus.modules()
    packages = {module.package for module in modules} - {""}
    for label in cfg.labels:
        if label not in packages:
            raise ValueError(f"data.labels: {label} is no sub-package of the corpus; there are {', '.join(packages)}")
    if len(set(cfg.labels)) < len(cfg.labels):
        raise ValueError(f"data.labels: {', '.join(cfg.labels)}: one is given twice")
    index = {label: i for i, label in enumerate(cfg.labels)}
    seen: set[str] = set()
    examples = []
    for function in functions.load(modules):
        target = index.get(corpus.package_of(function.module))
        # One text in two places would be in both splits, or have two labels: the first counts.
        if target is not None and function.num_lines >= cfg.min_lines and function.body not in seen:
            seen.add(function.body)
            examples.append(Example(function.body, label=target, origin=function.module))
    train, val = _by_module(examples, modules, cfg.val_percent)
    for name, split in (("training", train), ("validation", val)):
        missing = set(index.values()) - {example.label for example in split}
        if missing:
            names = ", ".join(cfg.labels[i] for i in sorted(missing))
            raise ValueError(f"data.labels: {names}: no function of at least {cfg.min_lines} lines in the {name} split")
    return train, val


def _by_module(
    examples: list[Example], modules: list[corpus.Module], percent: int
) -> tuple[list[Example], list[Example]]:
    held_out = corpus.validation_modules({module.path: len(module.text) for module in modules}, percent)
    train = [example for example in examples if example.origin not in held_out]
    return train, [example for example in examples if example.origin in held_out]


def _split(examples: Iterable[Example], percent: int) -> tuple[list[Example], list[Example]]:
    """By hash of the content, so that equal examples are on the same side."""
    keyed = [(example.prompt + "\0" + example.text, example) for example in examples]
    held_out = corpus.choose({key: 1 for key, _ in keyed}, percent)
    return [e for key, e in keyed if key not in held_out], [e for key, e in keyed if key in held_out]


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


def _jsonl(path: Path) -> Iterable[Example]:
    for number, line in enumerate(path.read_bytes().split(b"\n"), start=1):
        if not line.strip():
            continue
        where = f"{path}:{number}"
        if number == 1 and line.lstrip().startswith(b"["):
            raise ValueError(f"{where}: a JSON array; one object per line is read (jq -c '.[]' {path} makes that)")
        try:
            row = json.loads(line)
        except ValueError as error:  # not JSON, or not UTF-8
            raise ValueError(f"{where}: not JSON: {error}") from error
        if not isinstance(row, dict):
            raise ValueError(f"{where}: not an object with instruction, input and output")
        fields = {"instruction": row.get("instruction"), "input": row.get("input", ""), "output": row.get("output")}
        for key, value in fields.items():
            if not isinstance(value, str):
                fault = f"is {type(value).__name__}, not text" if key in row else "is missing"
                raise ValueError(f"{where}: {key!r} {fault}; a line holds instruction, input (may be empty), output")
        yield Example(fields["output"], prompt=template(fields["instruction"], fields["input"]), origin=where)


def _sample(examples: list[Example], cap: int) -> list[Example]:
    examples = list(examples)
    random.Random(0).shuffle(examples)
    return examples[:cap] if cap else examples


def _hash(objective: str, labels: tuple[str, ...], train: list[Example], val: list[Example]) -> str:
    sha = hashlib.sha256(json.dumps([objective, labels, len(train), len(val)]).encode())
    for example in (*train, *val):
        for part in (example.text, example.prompt, str(example.label)):
            content = part.encode("utf-8", "surrogatepass")
            sha.update(f"{len(content)}\0".encode() + content)
    return sha.hexdigest()
