"""Text for servers that take no token ids: a tokenizer in which each id is one word, so that a text has as many tokens
as was meant, whoever counts."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path

from llmsys.bench.serve.load import FIRST

CONFIG = {"tokenizer_class": "PreTrainedTokenizerFast", "unk_token": "<0>", "pad_token": "<0>", "eos_token": "<1>",
          "clean_up_tokenization_spaces": False, "model_max_length": 10**9}  # fmt: skip
"""A model with random weights says nothing, so that its words may be any."""


def word(token: int) -> str:
    """Of a token. Special ones look like no part of another: they are found wherever they stand."""
    return f"<{token}>" if token < FIRST else f"t{token}"


def text(ids: Sequence[int]) -> str:
    """Of these tokens."""
    return " ".join(map(word, ids))


def write(folder: Path, vocabulary: int) -> None:
    """`tokenizer.json` and `tokenizer_config.json`, as transformers, vLLM and others read them."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers

    made = Tokenizer(models.WordLevel({word(at): at for at in range(vocabulary)}, unk_token=word(0)))
    made.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    made.decoder = decoders.Fuse()
    made.save(str(folder / "tokenizer.json"))
    (folder / "tokenizer_config.json").write_text(json.dumps(CONFIG, indent=1) + "\n", encoding="utf-8")
