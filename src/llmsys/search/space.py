"""Settings to search over, in the words that Hydra has for sweeps, as Optuna's distributions."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from optuna.distributions import (
    BaseDistribution,
    CategoricalDistribution,
    FloatDistribution,
    IntDistribution,
)

HOW = (
    "KEY=interval(0.1,10), KEY=tag(log,interval(1e-5,1e-2)), KEY=int(interval(1,8)), KEY=range(10,60,10), "
    "KEY=choice(a,b)"
)


def parse(words: Sequence[str]) -> dict[str, BaseDistribution]:
    """By dotted key. ValueError names the word that is none."""
    found: dict[str, BaseDistribution] = {}
    for word in words:
        key, distribution = _one(word)
        if key in found:
            raise ValueError(f"search.space: {key} is there twice")
        found[key] = distribution
    return found


def _plain(value: Any) -> bool | int | float | str | None:
    """A word that was quoted is the word."""
    if isinstance(value, bool | int | float | str | None):
        return value
    if hasattr(value, "text"):
        return str(value.text)
    raise ValueError(f"{value} is no single value")


def _one(word: str) -> tuple[str, BaseDistribution]:
    from hydra.core.override_parser.overrides_parser import OverridesParser
    from hydra.core.override_parser.types import ChoiceSweep, IntervalSweep, RangeSweep
    from hydra.errors import HydraException

    try:
        override = OverridesParser.create().parse_override(word)
        value: Any = override.value()
    except HydraException:
        raise ValueError(f"search.space: {word!r}: must be one of {HOW}") from None
    key = override.key_or_group
    if "." not in key:
        raise ValueError(f"search.space: {word!r}: {key} is no key of a group: train.lr_scale")
    try:
        if isinstance(value, IntervalSweep) and value.start is not None and value.end is not None:
            log = "log" in value.tags
            if isinstance(value.start, int):
                return key, IntDistribution(value.start, int(value.end), log=log)
            return key, FloatDistribution(value.start, value.end, log=log)
        if isinstance(value, RangeSweep) and value.start is not None and value.stop is not None:
            return key, CategoricalDistribution(list(value.range()))
        if isinstance(value, ChoiceSweep) and not value.simple_form:
            return key, CategoricalDistribution([_plain(each) for each in value.list])
    except ValueError as error:
        raise ValueError(f"search.space: {word!r}: {error}") from None
    raise ValueError(f"search.space: {word!r}: must be one of {HOW}")
