"""Rows of tables as cells, (row, key, value), which is what is kept of them, and a data frame of these.

Records of many experiments have thousands of keys, and each has a few hundred of them: cells are as many as there are
values. Floats stand as they are; any other value is a code into a list of the distinct ones, which are few. A frame of
cells read from a cache and one of cells just made are built by the same lines: they are equal, types included.
"""

from __future__ import annotations

import copy
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
    columns: dict[str, list[tuple[Ints, tuple[Any, ...]]]] = {}
    for keys, (places, lines) in shapes.items():  # runs of one sweep have one shape: their columns are of a piece
        split, where = keys.index(None), numpy.array(places, numpy.int32)
        names = (*keys[: split + 1], *(f"config.{key}" for key in keys[split + 1 :]))
        for name, values in dict(zip(names, zip(*lines, strict=True), strict=True)).items():
            if name is not None and name != "config":
                columns.setdefault(name, []).append((where, values))
    return _coded(len(rows), columns)


def _coded(count: int, columns: dict[str, list[tuple[Ints, tuple[Any, ...]]]]) -> Cells:
    """The cells of columns, each in pieces: the rows that have it, and their values."""
    keys, table = ordered(set(columns)), _Table()
    lengths = [sum(len(where) for where, _ in columns[key]) for key in keys]
    row, code = numpy.empty(sum(lengths), numpy.int32), numpy.full(sum(lengths), -1, numpy.int32)
    number, at = numpy.full(sum(lengths), numpy.nan), 0
    for key in keys:
        for where, values in columns[key]:
            part = slice(at, at + len(where))
            at += len(where)
            row[part] = where
            types = set(map(type, values))
            if float in types:
                number[part] = [value if type(value) is float else numpy.nan for value in values]
            if types != {float}:
                code[part] = table.codes(values, types)
    key_of = numpy.repeat(numpy.arange(len(keys), dtype=numpy.int32), lengths)
    return Cells(count=count, keys=keys, values=table.values, key=key_of, row=row, code=code, number=number)


class _Table:
    """Distinct values: of equal ones of different types (1, True) each has its own."""

    def __init__(self) -> None:
        self.values: list[Any] = []
        self._known: dict[type, dict[Any, int]] = {}

    def codes(self, values: Sequence[Any], types: set[type]) -> int | list[int]:
        """Of values that have these types: their codes, or the one that all have."""
        if len(types) > 1 or not types <= _KINDS.keys():
            return [self._code(value) for value in values]
        known, distinct = self._known.setdefault(next(iter(types)), {}), set(values)
        for value in distinct:
            if value not in known:
                known[value] = self._add(value)
        return known[values[0]] if len(distinct) == 1 else list(map(known.__getitem__, values))

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
    copied = others[code] & (code >= 0)
    for each in numpy.unique(code[copied]).tolist():
        value = table[each]
        flat = type(value) is list and not {list, dict} & set(map(type, value))
        for place in row[code == each].tolist():
            column[place] = value[:] if flat else copy.deepcopy(value)
    return column
