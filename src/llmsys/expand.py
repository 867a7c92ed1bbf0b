"""What some settings stand for, filled in before a config is checked: `model.config`, `dispatch.world`, the ranks of a
prediction, the batch that advice is asked for, and the rows that it fine-tunes on."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from llmsys import schema, shape_file
from llmsys.words import key_of


def expand(values: dict[str, Any], words: Sequence[str]) -> dict[str, Any]:
    """`values`, a composed config, changed in place and returned; `words` of the command line say what was asked for.

    ValueError, in one line that names the key, where two settings contradict each other.
    """
    if not all(
        isinstance(values.get(group), dict) for group in ("task", "model", "data", "train", "engine", "hardware")
    ):
        return values  # what is missing is for `schema.build` to say
    _world(values, set(map(key_of, words)))
    task = schema.SCHEMAS["task"].get(values["task"].get("kind"), schema.Task)
    predicts = issubclass(task, schema.Predicting)
    shape_file.apply(values, words, build=not predicts)
    typed = set(map(key_of, words))
    if predicts:
        _ranks(values, typed)
    if issubclass(task, schema.Advise):
        _batch(values, typed)
        _data(values, typed)
    return values


def _world(values: dict[str, Any], typed: set[str]) -> None:
    """`dispatch.world` is another word for `train.world`, which is what the ranks are counted by."""
    dispatch, train = values.get("dispatch"), values["train"]
    if not isinstance(dispatch, dict) or not dispatch.get("world"):
        return
    if "train.world" in typed and train["world"] != dispatch["world"]:
        raise ValueError(f"dispatch.world={dispatch['world']}: and train.world={train['world']}; they are one")
    train["world"], dispatch["world"] = dispatch["world"], 0


def _ranks(values: dict[str, Any], typed: set[str]) -> None:
    """A rank on each of `hardware.devices`, and a micro-batch for each, where nothing else is asked for."""
    train, engine = values["train"], values["engine"]["kind"]
    if train["world"] == 1 and "train.world" not in typed and engine != "local":
        train["world"] = values["hardware"]["devices"]
    if "train.global_batch" not in typed:
        _divisible(values)


def _batch(values: dict[str, Any], typed: set[str]) -> None:
    """A micro-batch and a global batch that were typed are what is asked for; others are an experiment's defaults.

    What was asked for stands in `task`: on which ranks a batch divides is for advice to say, which may ask fewer.
    """
    train, task = values["train"], values["task"]
    if "train.micro_batch" in typed and not task["micro_batches"]:
        task["micro_batches"] = [train["micro_batch"]]
    if "train.global_batch" in typed and not task["global_batch"]:
        task["global_batch"] = train["global_batch"]
    _divisible(values)


def _data(values: dict[str, Any], typed: set[str]) -> None:
    """Fine-tuning is on prompts and answers, whose rows are padded: where nothing is said, as long as Alpaca's."""
    asked = any(word.split(".")[0] == "data" for word in typed)
    if values["task"]["stage"] == "finetune" and values["data"]["kind"] == "synthetic" and not asked:
        values["data"]["kind"] = "synthetic_pairs"


def _divisible(values: dict[str, Any]) -> None:
    """A micro-batch for each rank, where the global batch is no multiple of that."""
    train = values["train"]
    each = train["micro_batch"] * (1 if values["engine"]["kind"] == "tp" else train["world"])
    if each > 0 and train["global_batch"] % each:
        train["global_batch"] = each
