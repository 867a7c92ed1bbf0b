"""Configs as plain dicts under dotted keys: read, changed, and counted where one key goes with another."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from typing import Any

Config = dict[str, Any]


def get(config: Mapping[str, Any], key: str) -> Any:
    """The value under a dotted key; None where there is none."""
    found: Any = config
    for part in key.split("."):
        if not isinstance(found, Mapping) or part not in found:
            return None
        found = found[part]
    return found


def changed(config: Config, **values: Any) -> Config:
    """A copy with other values, each a dotted key (`__` for the dot) that must exist; its command says so too."""
    made = copy.deepcopy(config)
    words = list(made.get("command", []))
    for name, value in values.items():
        key = name.replace("__", ".")
        group, _, last = key.rpartition(".")
        inner = get(made, group) if group else made
        if not isinstance(inner, dict) or last not in inner:
            raise ValueError(f"{key}: no such setting to vary")
        inner[last] = value
        words = [word for word in words if word.partition("=")[0].lstrip("+") != key] + [f"{key}={value}"]
    return {**made, "command": words}


def shares(config: Config) -> int:
    """Into how many shares the global batch is cut: `schema.data_world` of a plain config."""
    return 1 if config["engine"]["kind"] == "tp" else int(config["train"]["world"])


def with_value(config: Config, key: str, value: int, resolved: Config | None = None) -> Config:
    """`config` with another value under `key`; a micro-batch takes the global batch along, so that as many of them are
    accumulated as before. `resolved`: the config as it is run, where that differs in its engine."""
    if key != "train.micro_batch":
        return changed(config, **{key.replace(".", "__"): value})
    seen = resolved or config
    batch, micro, cut = seen["train"]["global_batch"], seen["train"]["micro_batch"], shares(seen)
    accumulation = max(1, batch // (micro * cut))
    return changed(config, train__micro_batch=value, train__global_batch=value * cut * accumulation)
