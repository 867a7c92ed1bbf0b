"""A data set by kind, and how it is cut."""

from __future__ import annotations

from dataclasses import dataclass, field

from llmsys.schema.fields import at_least, one_of

OBJECTIVES = {
    "code_lm": ("causal_lm",),
    "code_docstrings": ("causal_lm", "seq2seq"),
    "code_packages": ("classification",),
    "synthetic": ("causal_lm",),
    "synthetic_pairs": ("causal_lm", "seq2seq"),
    "jsonl": ("causal_lm", "seq2seq"),
    "hub": ("causal_lm", "seq2seq", "classification"),
    "digits": ("images",),
    "cifar10": ("images",),
}
"""Kind of data -> the objectives that it can serve."""

WHOLE_CORPUS = ("code_lm", "code_docstrings")
"""Kinds that are cut from all of the pinned corpus, or from `data.packages` of it."""

COLUMNS = {
    "text": ("text",),
    "pair": ("source", "target"),
    "instruction": ("instruction", "input", "output"),
    "class": ("text", "text_pair", "label"),
}
"""What `data.columns` of `hub` may name, by the shape of an example."""


@dataclass(kw_only=True)
class Data:
    """A data set by kind.

    `path`: the file of `jsonl`, the folder of `cifar10`'s binary files, or for `hub` a folder that `datasets` saved, a
    folder of its parquet, json or csv files, or a hub id. `labels`: the classes of `code_packages`, in order.
    `packages`: the corpus's sub-packages that `code_lm` and `code_docstrings` are cut from (empty: all of it), so that
    a model can be pre-trained on some and tuned on others.
    `val_percent` of the *modules* (of the examples, where there are no modules) are the validation split, so the two
    share no file; data with a validation split of its own keeps that. `max_train` and `max_val` (0: all) cap a split.
    `augment`: crops and mirrors training images, drawn from the seed and the step. `make`: the command that makes the
    folder on a machine with a network, for the message that it is not there; `{path}` in it stands for the folder.

    Of `hub`: `subset` is the data set's configuration, `train_split` and `val_split` name its splits (`val_split` null:
    `val_percent` of the training split), and `columns` says which columns are what (see `COLUMNS`); a dotted name reads
    inside a column (`translation.de`). `prefix` stands before every source text, as T5's tasks have it
    (a causal LM reads it before the source of a {source, target} pair only: instructions have a template).
    """

    kind: str = "synthetic"
    path: str | None = None
    make: str = ""
    labels: list[str] = field(default_factory=list)
    packages: list[str] = field(default_factory=list)
    val_percent: int = 15
    min_lines: int = 3
    max_train: int = 0
    max_val: int = 0
    num_examples: int = 512
    augment: bool = False
    subset: str | None = None
    train_split: str = "train"
    val_split: str | None = None
    columns: dict[str, str] = field(default_factory=dict)
    prefix: str = ""

    def __post_init__(self) -> None:
        one_of("data.kind", self.kind, tuple(OBJECTIVES))
        if not 1 <= self.val_percent <= 50:
            raise ValueError(f"data.val_percent={self.val_percent}: must lie between 1 and 50")
        for key in ("min_lines", "max_train", "max_val"):
            at_least(f"data.{key}", getattr(self, key), 0)
        at_least("data.num_examples", self.num_examples, 2)
        if self.kind == "jsonl" and not self.path:
            raise ValueError("data.path: data=jsonl needs the path of a file, e.g. data.path=alpaca.jsonl")
        if self.kind in ("hub", "cifar10") and not self.path:
            raise ValueError(f"data.path: data={self.kind} needs the path of a folder, e.g. data.path=data/{self.kind}")
        if self.packages and self.kind not in WHOLE_CORPUS:
            raise ValueError(f"data.packages: is for data={' or data='.join(WHOLE_CORPUS)}, not for data={self.kind}")
        if self.kind == "code_packages" and len(self.labels) < 2:
            raise ValueError("data.labels: data=code_packages needs at least two labels")
        if self.kind == "hub":
            self._check_columns()

    @property
    def how_to_make(self) -> str:
        """The end of a message about a folder that is not there: the command that makes it, if one is known."""
        return f"; on a machine with a network: {self.make.replace('{path}', str(self.path))}" if self.make else ""

    def _check_columns(self) -> None:
        given = set(self.columns)
        if self.prefix and not given & {"source", "instruction"}:
            raise ValueError(
                f"data.prefix={self.prefix!r}: is for a source text; data.columns={self.columns} have none"
            )
        needed = [set(names) - {"input", "text_pair"} for names in COLUMNS.values()]
        for names, least in zip(COLUMNS.values(), needed, strict=True):
            if least <= given <= set(names):
                return
        shapes = " or ".join("{" + ", ".join(names) + "}" for names in COLUMNS.values())
        raise ValueError(
            f"data.columns={self.columns}: must name the columns of {shapes}: +data.columns={{text: <its name>}}"
        )
