"""Rows of tables as cells, (row, key, value), which is what is kept of them, and a data frame of these.

Records of many experiments have thousands of keys, and each has a few hundred of them: cells are as many as there are
values. Floats stand as they are; any other value is a code into a list of the distinct ones, which are few. A frame of
cells read from a cache and one of cells just made are built by the same lines: they are equal, types included.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy
import numpy.typing

from llmsys.rows import FIRST, Row

if TYPE_CHECKING:
    import pandas

Ints = numpy.typing.NDArray[numpy.int32]
_STR, _INT, _BOOL, _NONE, _OTHER, _FLOAT = range(6)
_KINDS = {str: _STR, int: _INT, bool: _BOOL, type(None): _NONE}


@dataclass(frozen=True, kw_only=True)
class Cells:
    """N cells of `count` rows, grouped by key in the order of `keys`. `key`, `row`, `code`: int32 [N], into `keys`, the
    rows and `values`; `number`: float64 [N], the value where `code` is -1."""

    count: int
    keys: list[str]
    values: list[Any]
    key: Ints
    row: Ints
    code: Ints
    number: numpy.typing.NDArray[numpy.float64]


def ordered(keys: set[str]) -> list[str]:
    """The columns of a frame: what identifies a run, its summary, its config; the last two by name."""
    first = [key for key in FIRST if key in keys]
    return first + sorted(keys.difference(first), key=lambda key: (key.startswith("config."), key))


def cells(rows: Sequence[Row]) -> Cells:
    """The cells of `rows`, whose config becomes `config.<key>`."""
    shapes: dict[tuple[Any, ...], tuple[list[int], list[tuple[Any, ...]]]] = {}
    for index, each in enumerate(rows):
        config = each["config"]
        places, lines = shapes.setdefault((*each, None, *config), ([], []))
        places.append(index)
        lines.append((*each.values(), None, *config.values()))
    columns: dict[str, tuple[list[int], list[Any]]] = {}
    for keys, (places, lines) in shapes.items():  # runs of one sweep have one shape: their columns are of a piece
        split = keys.index(None)
        names = (*keys[: split + 1], *(f"config.{key}" for key in keys[split + 1 :]))
        for name, values in dict(zip(names, zip(*lines, strict=True), strict=True)).items():
            if name is not None and name != "config":
                held = columns.setdefault(name, ([], []))
                held[0].extend(places)
                held[1].extend(values)
    return _coded(len(rows), columns)


def _coded(count: int, columns: dict[str, tuple[list[int], list[Any]]]) -> Cells:
    keys, table = ordered(set(columns)), _Table()
    size = sum(len(columns[key][0]) for key in keys)
    row, code = numpy.empty(size, numpy.int32), numpy.empty(size, numpy.int32)
    number, at = numpy.full(size, numpy.nan), 0
    for key in keys:
        places, values = columns[key]
        end = at + len(places)
        row[at:end] = places
        if set(map(type, values)) == {float}:
            code[at:end], number[at:end] = -1, values
        else:
            code[at:end] = table_codes = table.codes(values)
            if -1 in table_codes:
                number[at:end] = [value if type(value) is float else numpy.nan for value in values]
        at = end
    lengths = [len(columns[key][0]) for key in keys]
    key_of = numpy.repeat(numpy.arange(len(keys), dtype=numpy.int32), lengths)
    return Cells(count=count, keys=keys, values=table.values, key=key_of, row=row, code=code, number=number)


class _Table:
    """Distinct values: of equal ones of different types (1, True) each has its own."""

    def __init__(self) -> None:
        self.values: list[Any] = []
        self._known: dict[type, dict[Any, int]] = {}

    def codes(self, values: Sequence[Any]) -> list[int]:
        types = set(map(type, values))
        if len(types) == 1 and types <= _KINDS.keys():
            known = self._known.setdefault(types.pop(), {})
            for value in dict.fromkeys(values):
                if value not in known:
                    known[value] = self._add(value)
            return list(map(known.__getitem__, values))
        return [self._code(value) for value in values]

    def _code(self, value: Any) -> int:
        kind = type(value)
        if kind is float:
            return -1
        known = self._known.setdefault(kind, {})
        name = value if kind in _KINDS else repr(value)
        if name not in known:
            known[name] = self._add(value)
        return known[name]

    def _add(self, value: Any) -> int:
        self.values.append(value)
        return len(self.values) - 1


def merged(old: Cells, places: Sequence[int], new: Cells, others: Sequence[int]) -> Cells:
    """Those of both: row i of `old` becomes row `places[i]`, or goes where that is -1; row i of `new` `others[i]`. The
    rows that remain are numbered from 0 without gaps."""
    row = numpy.concatenate([numpy.array(places, numpy.int32)[old.row], numpy.array(others, numpy.int32)[new.row]])
    stays = row >= 0
    names = numpy.concatenate([old.key, new.key + len(old.keys)])[stays]
    both = [*old.keys, *new.keys]
    keys = ordered({both[index] for index in numpy.unique(names)})
    rank = {name: index for index, name in enumerate(keys)}
    key = numpy.array([rank.get(name, -1) for name in both], numpy.int32)[names]
    shifted = numpy.where(new.code < 0, new.code, new.code + len(old.values)).astype(numpy.int32)
    code = numpy.concatenate([old.code, shifted])[stays]
    used, code_of = numpy.unique(code[code >= 0], return_inverse=True)
    code[code >= 0] = code_of
    values = [*old.values, *new.values]
    number = numpy.concatenate([old.number, new.number])[stays]
    order = numpy.argsort(key, kind="stable")
    return Cells(
        count=sum(place >= 0 for place in places) + len(others),
        keys=keys,
        values=[values[index] for index in used],
        key=key[order],
        row=row[stays][order],
        code=code[order],
        number=number[order],
    )


def frame(held: Cells) -> pandas.DataFrame:
    """[count, keys]: the frame that pandas makes of the rows as dicts, with its types; a key a row lacks is NaN."""
    import pandas
    from pandas.api.extensions import take

    kinds = numpy.array([*(_KINDS.get(type(value), _OTHER) for value in held.values), _FLOAT])  # code -1 is the last
    ints = [value if type(value) is int and abs(value) < 2**63 else 0 for value in held.values]
    for index, value in enumerate(held.values):
        if type(value) is int and abs(value) >= 2**63:
            kinds[index] = _OTHER
    table = numpy.empty(len(held.values) + 1, object)
    table[:] = [*held.values, numpy.nan]
    whole, texts = numpy.array(ints, numpy.int64), _texts(held.values)
    ends = numpy.searchsorted(held.key, numpy.arange(len(held.keys) + 1))
    floats = numpy.bincount(held.key[held.code >= 0], minlength=len(held.keys)) == 0
    block = numpy.full((int(floats.sum()), held.count), numpy.nan)
    of_floats = floats[held.key]
    block[(numpy.cumsum(floats) - 1)[held.key[of_floats]], held.row[of_floats]] = held.number[of_floats]
    lines = iter(block)
    columns: dict[str, Any] = {}
    for index, key in enumerate(held.keys):
        if floats[index]:
            columns[key] = next(lines)
            continue
        part = slice(ends[index], ends[index + 1])
        row, code = held.row[part], held.code[part]
        kind = set(numpy.flatnonzero(numpy.bincount(kinds[code], minlength=6)).tolist())
        full = len(row) == held.count
        if kind == {_INT}:
            column = numpy.empty(held.count, numpy.int64) if full else numpy.full(held.count, numpy.nan)
            column[row] = whole[code]
            columns[key] = column
        elif texts is not None and _STR in kind <= {_STR, _NONE}:
            place = numpy.full(held.count, -1, numpy.int64)
            place[row] = numpy.where(kinds[code] == _STR, code, -1)
            columns[key] = take(texts, place, allow_fill=True)
        else:
            columns[key] = _inferred(_objects(held, part, table, kinds == _OTHER))
    return pandas.DataFrame(columns)


def _texts(values: list[Any]) -> Any:
    """The texts among `values`, each in its place, as pandas keeps texts; None where it keeps them as objects, as
    before pandas 3, or where one of them is no Unicode."""
    texts = _inferred([value if type(value) is str else "" for value in values])
    return None if texts.dtype == object else texts.array


def _inferred(values: Any) -> pandas.Series:
    import pandas

    found = pandas.Series(values, dtype=object)
    try:
        return found.infer_objects()
    except UnicodeEncodeError:  # half of a pair of surrogates, which JSON can hold: they stay objects
        return found


def _objects(held: Cells, part: slice, table: Any, others: Any) -> Any:
    """[count] of Python's own values, of which `table` has those that are no floats, and `others` says which of these
    are lists or dicts: each row gets one of its own. NaN where it has none."""
    column = numpy.full(held.count, numpy.nan, object)
    row, code = held.row[part], held.code[part]
    column[row] = table[code]
    column[row[code < 0]] = held.number[part][code < 0]
    for place in row[others[code] & (code >= 0)].tolist():
        column[place] = _own(column[place])
    return column


def _own(value: Any) -> Any:
    if type(value) is list:
        return [_own(each) if type(each) in (list, dict) else each for each in value]
    return {key: _own(each) for key, each in value.items()} if type(value) is dict else value
