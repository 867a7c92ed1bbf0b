"""A fleet from a file, YAML or JSON:

    providers:
      - {name: anna, card: rtx3080, up_mbit: 20, down_mbit: 100, region: de, efficiency: 0.45}
      - {name: box, tflops: 40, mem_gib: 11, up_mbit: 1000, down_mbit: 1000, trusted: true}
    between:
      - {regions: [de, fr], mbit: 200, delay_ms: 25}
    other: {delay_ms: 40}

A `card` of the hardware table brings peak, memory, price and power; what is given beside it replaces these.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from llmsys.cost.hardware import DEVICES
from llmsys.decentral import fleets
from llmsys.decentral.fleet import Between, Fleet, Provider


def read(path: str | Path, precision: str = "bf16") -> Fleet:
    """ValueError, which names the file and what in it, for anything that is no fleet."""
    import yaml

    try:
        data = yaml.safe_load(Path(path).expanduser().read_text(encoding="utf-8"))
    except OSError as error:
        known = ", ".join(fleets.FLEETS)
        raise ValueError(f"task.fleet={path}: must be one of {known}, or a file: {error.strerror}") from None
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise ValueError(f"task.fleet={path}: neither YAML nor JSON: {str(error).splitlines()[0]}") from None
    try:
        return of_data(data, precision)
    except ValueError as error:
        raise ValueError(f"task.fleet={path}: {error}") from None


def of_data(data: Any, precision: str = "bf16") -> Fleet:
    """The same from what a file holds."""
    if not isinstance(data, Mapping) or not isinstance(data.get("providers"), list):
        raise ValueError("must have `providers`, a list")
    _known("the file", data, ("providers", "between", "other"))
    members = tuple(_provider(at, each, precision) for at, each in enumerate(data["providers"]))
    regions = {each.region for each in members}
    between: dict[tuple[str, str], Between] = {}
    lines = data.get("between") or []
    if not isinstance(lines, list):
        raise ValueError(f"between: {lines}: must be a list")
    for each in lines:
        pair = each.get("regions") if isinstance(each, Mapping) else None
        if not isinstance(pair, list) or len(pair) != 2 or not all(isinstance(name, str) for name in pair):
            raise ValueError(f"between {each}: must have `regions`, two names")
        for name in pair:
            if name not in regions:
                raise ValueError(f"between {pair}: no provider is in region {name}")
        if (pair[0] != pair[1] and (pair[1], pair[0]) in between) or (pair[0], pair[1]) in between:
            raise ValueError(f"between {pair}: is there twice; a line is given once, for both directions")
        rest = {key: value for key, value in each.items() if key != "regions"}
        between[str(pair[0]), str(pair[1])] = _between(f"between {pair}", rest)
    return Fleet(providers=members, between=between, other=_between("other", data.get("other") or {}))


def _provider(at: int, given: Any, precision: str) -> Provider:
    if not isinstance(given, Mapping) or not isinstance(given.get("name"), (str, int)) or given["name"] in ("", True):
        raise ValueError(f"provider {at}: must be settings, `name`, a text, among them")
    name, values = str(given["name"]), {str(key): value for key, value in given.items()}
    fields = {each.name: each for each in dataclasses.fields(Provider)}
    _known(f"provider {name}", values, ("card", *fields))
    values["name"] = name
    for key, value in values.items():
        kind = str(fields[key].type) if key in fields else "str"
        if not _fits(value, kind):
            raise ValueError(f"provider {name}: {key}={value!r}: must be {WORDS[kind.split(' ')[0]]}")
    card = values.pop("card", None)
    for key in ("up_mbit", "down_mbit", *(() if card else ("tflops", "mem_gib"))):
        if key not in values:
            hint = "" if key.endswith("mbit") else f", and no card is named (card: {next(iter(DEVICES))})"
            raise ValueError(f"provider {name}: {key}: missing{hint}")
    if card is None:
        return Provider(**values)
    return fleets.provider(card, precision=precision, **values)


def _between(what: str, given: Any) -> Between:
    if not isinstance(given, Mapping):
        raise ValueError(f"{what}: must be settings, mbit and delay_ms")
    _known(what, given, ("mbit", "delay_ms"))
    for key, value in given.items():
        if not _number(value):
            raise ValueError(f"{what}: {key}={value!r}: must be a number")
    try:
        return Between(**given)
    except ValueError as error:
        raise ValueError(f"{what}: {error}") from None


WORDS = {"bool": "true or false", "str": "text", "float": "a number"}


def _fits(value: Any, kind: str) -> bool:
    if kind == "bool":
        return isinstance(value, bool)
    if kind == "str":
        return isinstance(value, str)
    return _number(value) or (value is None and "None" in kind)


def _number(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool)


def _known(what: str, given: Mapping[str, Any], names: tuple[str, ...]) -> None:
    if unknown := sorted(set(map(str, given)) - set(names)):
        raise ValueError(f"{what}: {unknown[0]}: must be one of {', '.join(names)}")
