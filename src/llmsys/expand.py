"""What some settings stand for, filled in before a config is checked: `model.config`, and the ranks of a prediction."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from llmsys import schema, shape_file


def expand(values: dict[str, Any], words: Sequence[str]) -> dict[str, Any]:
    """`values`, a composed config, changed in place and returned; `words` of the command line say what was asked for.

    ValueError, in one line that names the key, where two settings contradict each other.
    """
    if not all(isinstance(values.get(group), dict) for group in ("task", "model", "train", "engine", "hardware")):
        return values  # what is missing is for `schema.build` to say
    predicts = issubclass(schema.SCHEMAS["task"].get(values["task"].get("kind"), schema.Task), schema.Predicting)
    shape_file.apply(values, words, build=not predicts)
    if predicts:
        _ranks(values, {word.partition("=")[0].lstrip("+") for word in words})
    return values


def _ranks(values: dict[str, Any], typed: set[str]) -> None:
    """A rank on each of `hardware.devices`, and a micro-batch for each, where nothing else is asked for."""
    train, engine = values["train"], values["engine"]["kind"]
    if train["world"] == 1 and "train.world" not in typed and engine != "local":
        train["world"] = values["hardware"]["devices"]
    shares = 1 if engine == "tp" else train["world"]
    if "train.global_batch" not in typed and train["global_batch"] % (train["micro_batch"] * shares):
        train["global_batch"] = train["micro_batch"] * shares
