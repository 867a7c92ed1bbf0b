"""Text to ids and back: bytes, which need no file, or the tokenizer that lies beside a model's weights.

The latter is read from `tokenizer.json` by the `tokenizers` library alone; transformers takes seconds to import and
adds nothing here.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, Protocol


class Tokenizer(Protocol):
    """What encoding needs. `bos_id` and `eos_id` are None where a model has no such token; `pad_id` always is an id
    (a padded position has no attention and no loss, so any will do)."""

    vocab_size: int
    pad_id: int
    bos_id: int | None
    eos_id: int | None

    def encode(self, texts: list[str]) -> list[list[int]]:
        """Ids of each text, without special tokens."""
        ...

    def decode(self, ids: list[int]) -> str:
        """The text of ids, special tokens left out."""
        ...

    def wrap(self, ids: list[int], pair: list[int] | None = None) -> list[int]:
        """Ids between the model's own special tokens: [CLS] ... [SEP], or <s> ...; of two texts, [CLS] ... [SEP] ...
        [SEP], or <s> ... </s></s> ... </s>."""
        ...


class Bytes:
    """One id per byte of UTF-8 (0 to 255), then pad, begin and end of a text. Loses nothing, whatever the text."""

    vocab_size = 259
    pad_id = 256
    bos_id: int | None = 257
    eos_id: int | None = 258

    def encode(self, texts: list[str]) -> list[list[int]]:
        return [list(text.encode("utf-8")) for text in texts]

    def decode(self, ids: list[int]) -> str:
        """A sequence cut inside a character shows U+FFFD there."""
        return bytes(i for i in ids if i < 256).decode("utf-8", "replace")

    def wrap(self, ids: list[int], pair: list[int] | None = None) -> list[int]:
        return [257, *ids, 258, *([] if pair is None else [*pair, 258])]


class FromWeights:
    """The tokenizer of a published model, from the folder of its weights.

    Truncation and padding that the file may ask for are switched off: lengths are decided here, in one place.
    (all-MiniLM's file would cut at 128 tokens and pad to 128.)
    """

    def __init__(self, folder: Path) -> None:
        from tokenizers import Tokenizer as Fast

        path = folder / "tokenizer.json"
        if not path.is_file():
            raise ValueError(
                f"{path}: no such file; AutoTokenizer.from_pretrained(...).save_pretrained({str(folder)!r}), "
                "of transformers, makes it"
            )
        try:
            self._fast = Fast.from_file(str(path))
        except Exception as error:  # the library raises plain Exception, whatever is wrong with the file
            raise ValueError(f"{path}: not a tokenizer file: {error}") from error
        self._fast.no_truncation()
        self._fast.no_padding()
        self.vocab_size: int = self._fast.get_vocab_size(with_added_tokens=True)
        names = _special_tokens(folder)
        self.bos_id = self._id(names.get("bos_token"))
        self.eos_id = self._id(names.get("eos_token"))
        pad = self._id(names.get("pad_token"))
        self.pad_id: int = next((i for i in (pad, self.eos_id) if i is not None), 0)
        bare = self._fast.encode("a", add_special_tokens=False).ids
        full = self._fast.encode("a", add_special_tokens=True).ids
        at = next(i for i in range(len(full)) if full[i : i + len(bare)] == bare)
        self._prefix, self._suffix = full[:at], full[at + len(bare) :]
        two = self._fast.encode("a", "a", add_special_tokens=True).ids
        self._joins = True
        self._between = two[at + len(bare) : len(two) - len(self._suffix) - len(bare)]
        self._joins = self.wrap(bare, bare) == two

    def _id(self, name: str | None) -> int | None:
        return None if name is None else self._fast.token_to_id(name)

    def encode(self, texts: list[str]) -> list[list[int]]:
        return [encoding.ids for encoding in self._fast.encode_batch_fast(texts, add_special_tokens=False)]

    def decode(self, ids: list[int]) -> str:
        return self._fast.decode(ids, skip_special_tokens=True)

    def wrap(self, ids: list[int], pair: list[int] | None = None) -> list[int]:
        if pair is not None and not self._joins:
            raise ValueError("model.tokenizer=weights: its tokenizer.json has no template for two texts")
        second = [] if pair is None else [*self._between, *pair]
        return [*self._prefix, *ids, *second, *self._suffix]


def _special_tokens(folder: Path) -> dict[str, str]:
    """`bos_token`, `eos_token`, `pad_token` by name; each is a string or {"content": string} in the files."""
    names: dict[str, str] = {}
    for file in ("special_tokens_map.json", "tokenizer_config.json"):
        path = folder / file
        values: dict[str, Any] = json.loads(path.read_text("utf-8")) if path.is_file() else {}
        for key in ("bos_token", "eos_token", "pad_token"):
            value = values.get(key)
            content = value.get("content") if isinstance(value, dict) else value
            if isinstance(content, str):
                names[key] = content
    return names


def load(name: str, folder: Path | None) -> Tokenizer:
    """`bytes`, or `weights`: the one in `folder`. Raises ValueError where there is none."""
    if name == "bytes":
        return Bytes()
    if name != "weights":
        raise ValueError(f"model.tokenizer={name}: must be one of bytes, weights")
    if folder is None:
        raise ValueError("model.tokenizer=weights: random weights bring no tokenizer; use model.tokenizer=bytes")
    return FromWeights(folder)
