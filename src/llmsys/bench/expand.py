"""The key `techniques`: what is typed as `techniques=F+R+Z3+O` is a set of overrides before Hydra composes anything.

Among words, not among settings, because only there can a group be chosen and its settings given at once:
`techniques=QL method.r=64` sets `r` of the method that QL has chosen. A word of ours is left out where its key was
given too (`techniques=Z3 engine=fsdp2`); what is composed in the end must still be the combination that was asked for.

`goal=`, `emit=`, `slo_ttft_ms=` and `slo_tpot_ms=` are `task.goal=` and so on: what a person asks comes without the
name of a group.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

from llmsys import schema
from llmsys.bench.techniques import METHODS, Techniques
from llmsys.words import key_of

KEY = "techniques"
SHORT = {key: f"task.{key}" for key in ("goal", "emit", "slo_ttft_ms", "slo_tpot_ms")}
"""Settings of `bench_advise` that are typed without their group."""
SWEEPING = (",", "(", "[")
"""Marks of Hydra's sweeps: each job's own value comes later, by the launcher."""


def expanded(words: Sequence[str]) -> list[str]:
    """`words` with what `techniques=...` stands for behind it, and its text in the order that it is printed in; as they
    are where there is none, or it is swept over. ValueError for a text that stands for nothing."""
    words = [_whole(word) for word in words]
    if "+exp=bench_advise" in words and KEY in map(key_of, words):
        raise ValueError(
            f"{KEY}: is what bench_advise answers; task.letters=[F,Z3] says among which letters, and task.require=[F] "
            "which of them it must have"
        )
    given = {key_of(word) for word in words}
    found = []
    for word in words:
        text = _text(word)
        if text is None:
            found.append(word)
        else:
            asked = Techniques.parse(text)
            found += [f"{KEY}={asked}", *(own for own in asked.words() if key_of(own) not in given)]
    return found


def unexpanded(words: Iterable[str]) -> list[str]:
    """`words` without those that `techniques=...` among them stands for: shorter, and they mean the same."""
    words = list(words)
    implied = {own for word in words if (text := _text(word)) is not None for own in Techniques.parse(text).words()}
    return [word for word in words if word not in implied]


def check(plain: dict[str, Any]) -> None:
    """ValueError where a composed config, plain and with its `command`, is not the combination that its key
    `techniques` says, or where that key was in a file: there nothing expands it."""
    if plain.get(KEY) is None:
        return
    config = schema.build(plain)
    if KEY not in map(key_of, config.command):
        raise ValueError(
            f"{KEY}: is expanded before files are read, so it belongs on the command line "
            f"({KEY}={config.techniques}), or in a file under hydra.sweeper.params"
        )
    asked, found = Techniques.parse(str(config.techniques)), Techniques.of(config)
    if asked != found:
        raise ValueError(_clash(config, asked, found))


def _clash(config: schema.Config, asked: Techniques, found: Techniques) -> str:
    """The first setting that is not what was asked for, what would be, and what it amounts to as it is."""
    engine = f"zero{asked.zero}" + "_offload" * asked.offload if asked.zero else "local or engine=ddp"
    engine = "tp" if asked.tensor > 1 else engine
    attention = config.model.attention if isinstance(config.model, schema.Transformer) else ""
    zero = f" engine.zero={config.engine.zero}" if isinstance(config.engine, schema.DeepSpeed) else ""
    for field, key, value, means in (
        ("flash", "model.attention", attention, "sdpa" if asked.flash else "eager"),
        ("recompute", "train.recompute", config.train.recompute, "block" if asked.recompute else "none"),
        ("quantised", "model.quant", config.model.quant, "nf4" if asked.quantised else "none"),
        ("adapter", "method", config.method.kind, METHODS[asked.adapter]),
        ("zero", "engine", f"{config.engine.kind}{zero}", engine),
        ("offload", "engine", f"{config.engine.kind}{zero}", engine),
        ("tensor", "train.world" if config.engine.kind == "tp" and asked.tensor > 1 else "engine", "", engine),
        ("adam8", "train.optimizer", config.train.optimizer, "adamw_8bit" if asked.adam8 else "adamw"),
        ("fp8", "train.fp8", str(config.train.fp8).lower(), str(asked.fp8).lower()),
    ):
        if getattr(asked, field) != getattr(found, field):
            if key == "train.world":
                value, means = str(config.train.world), str(asked.tensor)
            value = value or config.engine.kind
            return f"{key}={value}: techniques={asked} means {means}; techniques={found}, or leave {key} out"
    raise AssertionError((asked, found))


def _text(word: str) -> str | None:
    """The one combination that a word `techniques=...` asks for; None for other words, for null, and for a sweep."""
    key, _, value = word.partition("=")
    value = value.strip().strip("'\"")
    if key.lstrip("+") != KEY or value in ("null", "") or any(mark in value for mark in SWEEPING):
        return None
    return value


def _whole(word: str) -> str:
    """A word of `SHORT` with its group; any other as it is."""
    key, equals, value = word.partition("=")
    return f"{SHORT.get(key, key)}{equals}{value}"
