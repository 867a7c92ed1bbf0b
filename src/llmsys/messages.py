"""Hydra's and OmegaConf's exceptions, as one line that names the key and the nearest right names.

Hydra 1.3 suggests nothing; the keys and choices there are come from the schema and from `conf/`.
"""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Iterable

from llmsys import compose, schema
from llmsys.nearest import nearest


def one_line(error: BaseException) -> str | None:
    """What to tell the user of `error`; None if it is not a mistake in the settings."""
    from hydra.errors import HydraException, OverrideParseException
    from omegaconf.errors import OmegaConfBaseException

    if not isinstance(error, (HydraException, OmegaConfBaseException)):
        return None
    if isinstance(error, OverrideParseException):
        key = str(error.override).partition("=")[0]
        return f"{error.override}: not KEY=VALUE; a value with spaces or signs needs quotes: \"{key}='...'\""
    chain: list[BaseException] = [error]
    cause = error.__cause__ or error.__context__
    while cause is not None and len(chain) < 5:
        chain.append(cause)
        cause = cause.__cause__ or cause.__context__
    text = "\n".join(str(link) for link in chain)
    for describe in (_twice, _choice, _key, _type, _missing):
        found = describe(text)
        if found:
            return found
    return " ".join(str(error).split())


def _twice(text: str) -> str | None:
    """A second choice of a group of which a file has made the first: a suite's own experiment."""
    found = re.search(r"Multiple values for (\w+)\. To override a value use 'override \w+: (\S+)'", text)
    if not found:
        return None
    group, name = found.groups()
    return f"+{group}={name}: a suite (sweep=) brings its own {group}; {group}={name}, without the plus, replaces it"


def _choice(text: str) -> str | None:
    """A group's option that does not exist, e.g. `+exp=lorafa_minlm`, or a group that doesn't."""
    option = re.search(r"Could not find '(\w+)/([^']+)'", text)
    if option:
        group, name = option.groups()
        there = list(compose.choices(group)) if group in compose.groups() else []
        return f"{group}={name}: no such choice; {_near(name, there)}"
    group_ = re.search(r"Could not (?:override|find) '([\w/]+)'\.?\s*(?:No match in the defaults list|$)", text, re.M)
    if group_:
        wanted = group_.group(1)
        if wanted.rstrip("/") == "exp":
            return "exp: an experiment is added to the defaults, with a plus: +exp=NAME"
        if wanted.rstrip("/") in schema.LATER:
            return _not_chosen(wanted.rstrip("/"))
        return f"{wanted}: no such group or setting; {_near(wanted, [*compose.groups(), *_keys()])}"
    return None


def _key(text: str) -> str | None:
    """A setting that does not exist, on the command line or in a file."""
    full = re.search(r"full_key: (\S+)", text)
    command = re.search(r"Could not override '([^']+)'", text)
    if not re.search(r"Key '[^']*' (?:is )?not in|Could not override", text):
        return None
    key = full.group(1) if full else command.group(1) if command else ""
    if not key:
        return None
    if key in schema.LATER:
        return _not_chosen(key)
    group, _, inner = key.partition(".")
    kinds = schema.SCHEMAS.get(group, {})
    owners = [kind for kind, cls in kinds.items() if inner in {field.name for field in dataclasses.fields(cls)}]
    if owners:
        return f"{key}: is a setting of {group}.kind={' or '.join(owners)}"
    parent = key.rpartition(".")[0]
    if parent in _keys():
        return f"{key}: a new entry is added with a plus: '+{parent}={{...}}'"
    return f"{key}: no such setting; {_near(key, _keys())}"


def _not_chosen(group: str) -> str:
    return f"{group}: none is chosen; +{group}=NAME does: {', '.join(compose.choices(group))}"


def _type(text: str) -> str | None:
    """A value of the wrong type."""
    found = re.search(r"Value '([^']*)'.*?could not be converted to (\w+)", text) or re.search(
        r"(?:Invalid type assigned|Cannot convert)[^']*'?([^'\n]*)'?.*?(\w+)\s*$", text, re.M
    )
    key = re.search(r"full_key: (\S+)", text)
    if not key:
        return None
    if "is not a ListConfig" in text:
        return f"{key.group(1)}: must be a list: {key.group(1)}=[...]"
    if found:
        return f"{key.group(1)}={found.group(1)}: must be of type {found.group(2).lower()}"
    first = next(line for line in text.splitlines() if line.strip() and "Error merging" not in line)
    return f"{key.group(1)}: {first}"


def _missing(text: str) -> str | None:
    found = re.search(r"Missing mandatory value: (\S+)", text)
    return f"{found.group(1)}: must be given, e.g. {found.group(1)}=..." if found else None


def _keys() -> list[str]:
    keys = []
    for field in dataclasses.fields(schema.Config):
        if field.name in schema.SCHEMAS:
            for cls in schema.SCHEMAS[field.name].values():
                keys += [f"{field.name}.{inner.name}" for inner in dataclasses.fields(cls)]
        elif field.name != "command":  # which nobody sets
            keys.append(field.name)
    return sorted(set(keys))


def _near(name: str, there: Iterable[str]) -> str:
    return nearest(name, there, "see python -m llmsys --help")
