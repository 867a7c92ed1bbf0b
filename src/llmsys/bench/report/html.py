"""Pieces of HTML as text. Whatever is not a `Markup` is escaped: names and errors in records come from anywhere."""

from __future__ import annotations

import html
import math
from collections.abc import Iterable, Sequence

from llmsys.spread import Spread


class Markup(str):
    """Text that is HTML already."""

    __slots__ = ()


def escaped(value: object) -> Markup:
    """`value` as HTML, between tags and in quoted attributes."""
    return value if isinstance(value, Markup) else Markup(html.escape(str(value), quote=True))


def join(parts: Iterable[object], by: str = "") -> Markup:
    """The parts one after another, escaped where they have to be."""
    return Markup(by.join(escaped(part) for part in parts))


def tag(name: str, *inside: object, **attributes: object) -> Markup:
    """`<name attributes>inside</name>`. Of attributes an underscore at the end is dropped (`class_`), others become
    hyphens; those that are None are left out."""
    words = [f' {key.rstrip("_").replace("_", "-")}="{escaped(v)}"' for key, v in attributes.items() if v is not None]
    return Markup(f"<{name}{''.join(words)}>{join(inside)}</{name}>")


def table(headers: Sequence[object], rows: Iterable[Sequence[object]], *, left: int = 1) -> Markup:
    """A table that scrolls by itself where it is too wide. The first `left` columns are words, the others numbers.

    A header row of its own may be given as one Markup that begins with `<tr`.
    """
    if len(headers) == 1 and isinstance(headers[0], Markup) and headers[0].startswith("<tr"):
        head = headers[0]
    else:
        head = tag("tr", *(_cell("th", each, i < left) for i, each in enumerate(headers)))
    body = join(tag("tr", *(_cell("td", each, i < left) for i, each in enumerate(row))) for row in rows)
    return tag("div", tag("table", tag("thead", head), tag("tbody", body)), class_="wide")


def _cell(name: str, value: object, word: bool) -> Markup:
    if isinstance(value, Markup) and value.startswith(f"<{name}"):
        return value
    return tag(name, "" if value is None else value, class_="w" if word else None)


def details(summary: object, *inside: object) -> Markup:
    """What is folded away until it is asked for."""
    return tag("details", tag("summary", summary), *inside)


def paragraph(*inside: object, class_: str | None = None) -> Markup:
    return tag("p", *inside, class_=class_)


def number(value: float, digits: int = 3) -> str:
    """With so many significant digits, and never fewer than are before the point: 12,345 and 0.0123."""
    if not math.isfinite(value):
        return "–"
    if value == 0:
        return "0"
    after = max(0, digits - 1 - math.floor(math.log10(abs(value)) + 1e-12))
    return f"{value:,.{after}f}"


def measured(found: Spread | None, repeats: int = 1, scale: float = 1.0) -> str:
    """A mean over repeats, with half its 95 % interval where there are several, to that half's second digit. Three
    digits of a single measurement, and of what is the same in every run, as bytes are."""
    if found is None:
        return "–"
    mean, half = found.mean * scale, found.half * scale
    if repeats < 2 or half < abs(mean) * 1e-4:
        return number(mean)
    digits = 1 - math.floor(math.log10(half))
    after = max(0, digits)
    return f"{round(mean, digits):,.{after}f} ± {round(half, digits):,.{after}f}"


def signed(percent: float) -> str:
    """A change in percent, with its sign; one digit behind the point below ten."""
    text = f"{percent:+.{1 if abs(percent) < 9.95 else 0}f} %"
    return text.replace("-", "\N{MINUS SIGN}")


def interval(low: float | None, high: float | None) -> str:
    """A 95 % interval of a change; "" where there is none."""
    return "" if low is None or high is None else f"{signed(low)[:-2]} to {signed(high)}"


def count(number: int, what: str, many: str = "") -> str:
    """`1 record`, `2 records`."""
    return f"{number:,} {what if number == 1 else many or what + 's'}"
