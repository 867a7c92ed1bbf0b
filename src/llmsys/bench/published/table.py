"""A file of published numbers: read, and refused in one line for anything that would silently match nothing."""

from __future__ import annotations

import csv
import difflib
import functools
import math
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from llmsys import compose
from llmsys.bench.published.quantities import MODULES, OF_MODULES, QUANTITIES, Quantity, of_module
from llmsys.bench.techniques import Techniques
from llmsys.cost.hardware import DEVICES

KEYS = ("hardware", "world", "model", "techniques", "batch", "length", "r", "module")
SOURCE = "source"
PAPER, THIRD = "paper", "third party: "
OOM = math.inf
"""A published cell that says it ran out of memory: more than there is."""
_HEADER = re.compile(r"(?P<name>\w+) \[(?P<unit>[^\]]+)\]")


@dataclass(frozen=True, kw_only=True)
class Machine:
    """A machine by its name: `card`, a row of `cost.hardware.DEVICES`, `devices` of it, and whether joined by NVLink
    where the card can have it."""

    card: str
    devices: int = 1
    nvlink: bool = True

    @classmethod
    def parse(cls, name: str) -> Machine:
        """Of a name in `conf/hardware`: `a800x8`, `rtx3090x8_pcie`."""
        if name in DEVICES:
            return cls(card=name)
        found = re.fullmatch(r"(?P<card>\w+?)x(?P<devices>\d+)(?P<pcie>_pcie)?", name)
        if found is None or found["card"] not in DEVICES:
            raise ValueError(f"hardware {name!r} is no machine of known cards")
        return cls(card=found["card"], devices=int(found["devices"]), nvlink=not found["pcie"])


@dataclass(frozen=True, kw_only=True)
class Column:
    """A column of numbers."""

    header: str
    name: str
    unit: str


@dataclass(frozen=True, kw_only=True)
class Row:
    """`keys`: those that are given, as canonical text. `numbers`: by header, in our units; `OOM`, or left out where
    nobody has filled it in."""

    line: int
    keys: dict[str, str]
    numbers: dict[str, float]
    source: str


@dataclass(frozen=True, kw_only=True)
class Table:
    """A file. `keys` and `columns` in its order."""

    name: str
    keys: tuple[str, ...]
    columns: tuple[Column, ...]
    rows: tuple[Row, ...]

    def quantity(self, column: Column, row: Row) -> Quantity:
        module = row.keys.get("module")
        return of_module(column.name, module) if module else QUANTITIES[column.name]

    def has(self, name: str) -> bool:
        return any(column.name == name for column in self.columns)

    @property
    def of_modules(self) -> bool:
        return "module" in self.keys


def read(path: Path) -> Table:
    """ValueError, with file, line, and what would be right, for an unknown column or unit, a key that could match no
    record, a value that is no number, a number without a source, and a row that stands there twice."""
    try:
        lines = path.read_text(encoding="utf-8-sig").splitlines()
    except UnicodeDecodeError as error:
        raise ValueError(f"{path}: is no UTF-8 text: {error.reason}") from None
    kept = [(number, line) for number, line in enumerate(lines, 1) if line.strip() and not line.startswith("#")]
    if not kept:
        raise ValueError(f"{path}: is empty; its first line is {','.join(KEYS[:4])},throughput [tokens/s],{SOURCE}")
    parsed = list(csv.reader(line for _, line in kept))
    headers = [header.strip() for header in parsed[0]]
    columns = _columns(path, headers)
    rows: list[Row] = []
    seen: dict[tuple[object, ...], int] = {}
    for (number, _), cells in zip(kept[1:], parsed[1:], strict=True):
        if len(cells) != len(headers):
            raise ValueError(f"{path}:{number}: has {len(cells)} cells; there are {len(headers)} columns")
        row = _row(f"{path}:{number}", number, dict(zip(headers, map(str.strip, cells), strict=True)), columns)
        place = (*sorted(row.keys.items()), row.source)
        if place in seen:
            raise ValueError(f"{path}:{number}: the same keys and source as in line {seen[place]}")
        seen[place] = number
        rows.append(row)
    keys = tuple(header for header in headers if header in KEYS)
    return Table(name=path.stem, keys=keys, columns=tuple(columns), rows=tuple(rows))


def _example(name: str) -> str:
    units = QUANTITIES[name].units if name in QUANTITIES else of_module(name, MODULES[0]).units
    return f"{name} [{next(iter(units))}]"


def _columns(path: Path, headers: Sequence[str]) -> list[Column]:
    """The numbers' columns, of headers that are all known."""
    names = OF_MODULES if "module" in headers else tuple(QUANTITIES)
    found = []
    for header in headers:
        if headers.count(header) > 1:
            raise ValueError(f"{path}: column {header!r} stands there twice")
        if header in (*KEYS, SOURCE):
            continue
        parts = _HEADER.fullmatch(header)
        if parts is None or parts["name"] not in names:
            word = parts["name"] if parts else header
            if word in names:
                raise ValueError(
                    f"{path}: column {header!r} is without its unit: a number's header is {_example(word)}"
                )
            near = difflib.get_close_matches(word, (*KEYS, *names, SOURCE), n=1)
            hint = f"did you mean {near[0]}?" if near else f"keys are {', '.join(KEYS)}, numbers {', '.join(names)}"
            raise ValueError(
                f"{path}: column {header!r} is unknown; {hint} A number's header is: throughput [tokens/s]"
            )
        units = of_module(parts["name"], MODULES[0]).units if names is OF_MODULES else QUANTITIES[parts["name"]].units
        if parts["unit"] not in units:
            raise ValueError(f"{path}: column {header!r}: {parts['name']} is in {' or '.join(units)}")
        found.append(Column(header=header, name=parts["name"], unit=parts["unit"]))
    if SOURCE not in headers or not found:
        raise ValueError(f"{path}: needs a column {SOURCE} and one of numbers, such as throughput [tokens/s]")
    return found


def _row(where: str, line: int, cells: dict[str, str], columns: Sequence[Column]) -> Row:
    keys = {key: _key(where, key, cells[key]) for key in KEYS if cells.get(key)}
    if "module" in cells and "module" not in keys:
        raise ValueError(f"{where}: module is empty; there are {', '.join(MODULES)}")
    numbers = {}
    for column in columns:
        text = cells[column.header]
        if text.lower() == "oom":
            numbers[column.header] = OOM
        elif text:
            units = of_module(column.name, keys["module"]).units if "module" in keys else QUANTITIES[column.name].units
            numbers[column.header] = _number(where, column, text) * units[column.unit]
    source = cells[SOURCE]
    if numbers and not source:
        raise ValueError(f"{where}: has a number and no source; it is {PAPER!r}, or '{THIRD}WHO'")
    if source and source != PAPER and not (source.startswith(THIRD) and source.removeprefix(THIRD).strip()):
        raise ValueError(f"{where}: source {source!r} must be {PAPER!r}, or '{THIRD}WHO'")
    return Row(line=line, keys=keys, numbers=numbers, source=source)


def _number(where: str, column: Column, text: str) -> float:
    try:
        value = float(text)
    except ValueError:
        value = math.nan
    if not math.isfinite(value) or value < 0:
        raise ValueError(f"{where}: {column.header}: {text!r} is neither a number (1234.5), nor oom, nor empty")
    return value


def _key(where: str, key: str, text: str) -> str:
    """A key's canonical text."""
    if key == "techniques":
        try:
            return str(Techniques.parse(text))
        except ValueError as error:
            raise ValueError(f"{where}: {error}") from None
    known: Sequence[str] = ()
    if key in ("hardware", "model"):
        known = _choices(key)
    elif key == "module":
        known = MODULES
    elif not text.isdecimal() or int(text) < 1:
        raise ValueError(f"{where}: {key} {text!r} must be a whole number of 1 or more, or empty")
    if known and text not in known:
        near = difflib.get_close_matches(text, known, n=1)
        hint = f"did you mean {near[0]}?" if near else f"there are {', '.join(known)}"
        raise ValueError(f"{where}: {key} {text!r} matches nothing; {hint}")
    return text if known else str(int(text))


@functools.cache
def _choices(group: str) -> tuple[str, ...]:
    """The names in a group of settings; a table asks for them in each of its rows."""
    return tuple(name for name in compose.choices(group) if name != "auto")
