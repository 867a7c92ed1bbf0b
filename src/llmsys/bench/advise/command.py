"""Our own command that runs a choice: the words that compose to just what was predicted.

Whatever a config is made of (words, files of one's own, Python), its command is made from the config alone: an
experiment and the choices of groups that come near are composed, and a word is added for each setting that then still
differs. Of what was typed only the names of choices are taken over, and how many examples there are.
"""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from llmsys import compose, schema, shape_file
from llmsys.bench.advise import measured, space
from llmsys.bench.techniques import METHODS, Techniques
from llmsys.words import key_of

GROUPS = ("model", "data", "method", "engine", "network", "compress")
"""Groups in which a command is to agree with the config, setting by setting."""
TRAIN = ("precision", "length", "world", "micro_batch", "global_batch")
"""Numbers that the answer is about: they stand in every command."""
STEP = (*TRAIN, "target_length", "loss", "clip", "recompute", "optimizer", "fp8")
"""Settings of `train` in which it is to agree."""
FREE = ("data.num_examples", "data.max_val", "model.config")
"""Settings that change no step, and the file that gives a shape."""
ALPACA = "alpaca_lengths"
"""What `bench_finetune` trains on; `bench_pretrain` on `synthetic` data."""
PLAIN = re.compile(r"[A-Za-z_][\w./-]*")
"""Text that Hydra reads as it is, but for these words."""
WORDS = ("null", "true", "false", "nan", "inf")
Plain = dict[str, Any]


def words(config: schema.Config) -> list[str]:
    """What stands behind `python -m llmsys`. ValueError, in one line, where nothing can be run that is this config: a
    shape that is predicted and not built, say."""
    asked, wanted = Techniques.of(config), dataclasses.asdict(config)
    near = [*_chosen(config, asked), *(f"train.{key}={getattr(config.train, key)}" for key in TRAIN)]
    near += _beside(config, asked)
    given = set(map(key_of, near))
    letters = [word for word in asked.words() if key_of(word) not in given]  # not yet checked against the model
    found = [near[0], f"techniques={asked}", *near[1:]]
    found += _differences(compose.compose([*near, *letters]), wanted)
    made = compose.compose(found)
    schema.build(made)
    for left in _differences(made, wanted):
        raise ValueError(f"{key_of(left)}: is {left.partition('=')[2]}, which no command of ours says beside the rest")
    return found


def _chosen(config: schema.Config, asked: Techniques) -> list[str]:
    """The experiment, and the choices of groups that are not its own."""
    finetunes = bool(space.advise(config).stage == "finetune" and asked.adapter)
    found = [f"+exp={'bench_finetune' if finetunes else 'bench_pretrain'}"]
    model, typed = config.model, {key_of(word): word.partition("=")[2] for word in config.command}
    assert isinstance(model, schema.Transformer)
    if model.config is not None and _as_in_file(model):
        found.append(f"model.config={_text(str(Path(model.config).expanduser().resolve()))}")
    elif name := _choice("model", typed, model.name):
        found.append(f"model={name}")
    name = _choice("data", typed, ALPACA if config.data.kind == "synthetic_pairs" else "")
    if name and name != (ALPACA if finetunes else "synthetic"):
        found.append(f"data={name}")
    if name and "data.path" in typed:  # which some choices need
        found.append(f"data.path={_text(config.data.path)}")
    found += [f"{key}={typed[key]}" for key in FREE if key.startswith("data.") and key in typed]
    if (name := _choice("network", typed, config.network.name)) not in ("", "none"):
        found.append(f"network={name}")
    return found + ([f"compress={config.compress.kind}"] if config.compress.kind != "none" else [])


def _choice(group: str, typed: dict[str, str], name: str) -> str:
    """The choice that was typed, or is called so; "" where there is neither, and every setting is to be given."""
    known = compose.choices(group)
    return next((each for each in (typed.get(group), name) if each in known), "")


def _as_in_file(model: schema.Transformer) -> bool:
    """Whether the shape is still its file's: a program may have changed it."""
    assert model.config is not None
    found = shape_file.shape(model.config)
    return all(getattr(model, key) == value for key, value in found.items() if key not in shape_file.FREE)


def _beside(config: schema.Config, asked: Techniques) -> list[str]:
    """What letters leave open: one rank, who cuts the weights, whose adapters, and the threads of a calibrated CPU."""
    found = []
    if isinstance(config.engine, schema.FSDP2) or config.engine.kind == "local":
        found.append(f"engine={config.engine.kind}")
    if config.method.kind != METHODS[asked.adapter]:
        found.append(f"method={config.method.kind}")
    here = measured.place(config)
    return found + ([f"train.threads={here.threads}"] if here and here.threads else [])


def _differences(found: Plain, wanted: Plain) -> Iterator[str]:
    """A word for each setting of `wanted` that `found` has otherwise, or not at all."""
    for group in (*GROUPS, "train"):
        for key in STEP if group == "train" else wanted[group]:
            value = wanted[group][key]
            if f"{group}.{key}" not in FREE and (key not in found[group] or found[group][key] != value):
                yield f"{'+' if isinstance(value, dict) else ''}{group}.{key}={_text(value)}"


def _text(value: Any) -> str:
    """A value as Hydra reads it."""
    if isinstance(value, dict):
        return "{" + ",".join(f"{_text(key)}:{_text(each)}" for key, each in value.items()) + "}"
    if isinstance(value, list):
        return "[" + ",".join(map(_text, value)) + "]"
    if value is None or isinstance(value, bool):
        return {None: "null", True: "true", False: "false"}[value]
    if not isinstance(value, str):
        return repr(value)
    if PLAIN.fullmatch(value) and value.lower() not in WORDS:
        return value
    return "'" + value.replace("\\", "\\\\").replace("'", "\\'") + "'"
