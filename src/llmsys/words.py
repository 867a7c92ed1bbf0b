"""Words of a command line, as Hydra reads them: `key=value`, with `+` before it where a key is added."""

from __future__ import annotations


def key_of(word: str) -> str:
    """What a word is about: `model` of `model=llama_6m`, `exp` of `+exp=bench_ops`."""
    return word.partition("=")[0].lstrip("+~")
