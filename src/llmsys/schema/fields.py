"""The two checks that nearly every setting needs; each raises a ValueError that names the dotted key."""

from __future__ import annotations

from collections.abc import Sequence


def one_of(key: str, value: str, allowed: Sequence[str]) -> None:
    """`value` is one of the `allowed` words."""
    if value not in allowed:
        raise ValueError(f"{key}={value}: must be one of {', '.join(allowed)}")


def at_least(key: str, value: float, least: float) -> None:
    """`value` is a number of at least `least`; a NaN is not."""
    if not value >= least:
        raise ValueError(f"{key}={value}: must be at least {least:g}")
