"""Charts as inline SVG: points over two axes, effects with intervals, stacked bars. Colours are the page's variables,
so that a chart is readable on dark and on light; every mark has a <title>, which a browser shows under the pointer."""

from __future__ import annotations

import itertools
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from llmsys.bench.report.html import Markup, join, number, tag

WIDTH = 1000
COLOURS = 7
"""How many the page has: `--c0` and on."""


@dataclass(frozen=True, kw_only=True)
class Point:
    """`series`: what the legend calls its `colour`; `title`: what is said under the pointer; `label`: what is written
    beside it; `hollow`: it is there, and not in the running."""

    x: float
    y: float
    series: str
    colour: int
    title: str
    label: str = ""
    hollow: bool = False


@dataclass(frozen=True, kw_only=True)
class Axis:
    """From `low` to `high` in `ticks`; `log`: all are positive, and equal ratios are equally far."""

    name: str
    low: float
    high: float
    ticks: tuple[float, ...]
    log: bool = False

    def share(self, value: float) -> float:
        """Where a value lies, from 0 to 1."""
        if self.log:
            return math.log(value / self.low) / math.log(self.high / self.low)
        return (value - self.low) / (self.high - self.low)


def axis(name: str, values: Sequence[float], *, zero: bool = False) -> Axis:
    """Ticks at round numbers around `values`; `zero`: from 0 on."""
    low, high = min(values), max(values)
    if zero:
        low, high = min(0.0, low), max(0.0, high)
    if high <= low:
        low, high = (low - 1, high + 1) if low == 0 else (low - abs(low) / 2, high + abs(high) / 2)
    rough = (high - low) / 5
    unit = 10 ** math.floor(math.log10(rough))
    step = next(factor * unit for factor in (1, 2, 2.5, 5, 10) if factor * unit >= rough * 0.999)
    first, last = math.floor(low / step + 1e-9), math.ceil(high / step - 1e-9)
    ticks = tuple(step * index for index in range(first, last + 1))
    return Axis(name=name, low=ticks[0], high=ticks[-1], ticks=ticks)


def log_axis(name: str, values: Sequence[float]) -> Axis:
    """For positive `values`. Ticks at 1, 2 and 5 times powers of ten, or closer where that would be less than four."""
    low, high = min(values) / 1.15, max(values) * 1.15
    powers = range(math.floor(math.log10(low)), math.ceil(math.log10(high)) + 1)
    ticks = [factor * 10.0**power for power in powers for factor in (1, 2, 5)]
    ticks = [tick for tick in ticks if low <= tick <= high]
    if len(ticks) < 4:
        ticks = [tick for tick in axis(name, (low, high)).ticks if low <= tick <= high]
    return Axis(name=name, low=low, high=high, ticks=tuple(ticks), log=True)


def scatter(
    points: Sequence[Point], x: Axis, y: Axis, *, line: Sequence[tuple[float, float]] = (), diagonal: bool = False
) -> Markup:
    """Points, and steps through `line`: the best that can be had of y up to each x. `diagonal`: where x is y."""
    left, right, top, bottom, height = 74, 20, 18, 50, 400
    wide, high = WIDTH - left - right, height - top - bottom

    def at(a: float, b: float) -> tuple[float, float]:
        return left + wide * x.share(a), top + high * (1 - y.share(b))

    series = dict(sorted({point.series: point.colour for point in points}.items(), key=lambda each: each[1]))
    marks = [_grid(x, y, left, top, wide, high)]
    if diagonal:
        low, top_value = max(x.low, y.low), min(x.high, y.high)
        marks.append(_path([at(low, low), at(top_value, top_value)], "diagonal"))
    if line:
        steps = [at(*line[0])]
        for (_, before), (a, b) in itertools.pairwise(line):
            steps += [at(a, before), at(a, b)]
        marks.append(_path([*steps, (left + wide, steps[-1][1])], "front"))
    boxes: list[tuple[float, float, float]] = []
    for point in points:
        px, py = at(point.x, point.y)
        style = f"{'h' if point.hollow else 's'}{point.colour % COLOURS}"
        dot = tag("circle", tag("title", point.title), cx=_px(px), cy=_px(py), r=5.5, class_=style)
        marks.append(dot)
    for point in sorted((p for p in points if p.label), key=lambda p: p.x):
        marks.append(_label(point.label, *at(point.x, point.y), left + wide, boxes))
    return join([_legend(series), _svg(height, marks)])


def effects(
    rows: Sequence[tuple[str, float, float | None, float | None, Sequence[tuple[float, str]]]], name: str
) -> Markup:
    """A row a letter: (its name, mean, ends of the interval or None, (value, title) of each pair), in percent."""
    left, right, top, each = 64, 16, 8, 30
    height = top + each * len(rows) + 44
    ends = [v for _, mean, low, high, pairs in rows for v in (mean, *(value for value, _ in pairs))]
    limit = 1.6 * max(map(abs, ends))  # an interval of two pairs that disagree is wider than any page
    ends += [max(-limit, min(limit, v)) for _, _, *between, _ in rows for v in between if v is not None]
    x = axis(name, ends, zero=True)
    wide = WIDTH / 2 - left - right

    def at(value: float) -> float:
        return left + wide * min(1.0, max(0.0, x.share(value)))

    bottom = height - 40
    marks = [
        tag("line", x1=_px(at(t)), x2=_px(at(t)), y1=top, y2=bottom, class_="zero" if t == 0 else "grid")
        for t in x.ticks
    ]
    marks += [_text(at(t), bottom + 16, _tick(t), "middle") for t in x.ticks]
    marks.append(_text(left + wide / 2, height - 6, name, "middle", "name"))
    for index, (letter, mean, low, high, pairs) in enumerate(rows):
        y = top + each * (index + 0.5)
        marks.append(_text(left - 8, y + 4, letter, "end", "word"))
        if low is not None and high is not None:
            marks.append(tag("line", x1=_px(at(low)), x2=_px(at(high)), y1=_px(y), y2=_px(y), class_="interval"))
        for value, title in pairs:
            marks.append(tag("circle", tag("title", title), cx=_px(at(value)), cy=_px(y), r=3.5, class_="pair"))
        points = " ".join(f"{_px(at(mean) + dx)},{_px(y + dy)}" for dx, dy in ((0, -7), (6, 0), (0, 7), (-6, 0)))
        marks.append(tag("polygon", tag("title", f"{letter}: mean {mean:+.1f} %"), points=points, class_="mean"))
    return _svg(height, marks, WIDTH / 2)


@dataclass(frozen=True, kw_only=True)
class Bar:
    """A stacked bar: its name, parts by series, and what is written at its end."""

    name: str
    parts: Mapping[str, float] = field(default_factory=dict)
    end: str = ""


def bars(rows: Sequence[Bar], unit: str) -> Markup:
    """Horizontal stacked bars with one scale."""
    names = dict.fromkeys(name for row in rows for name in row.parts)
    series = {name: index for index, name in enumerate(names)}
    left = min(300, 24 + 7 * max(len(row.name) for row in rows))
    right, top, each = 90, 6, 24
    height = top + each * len(rows) + 46
    x = axis(unit, [sum(row.parts.values()) for row in rows], zero=True)
    wide = WIDTH - left - right
    bottom = height - 42
    marks = []
    for t in x.ticks:
        at = left + wide * x.share(t)
        marks.append(tag("line", x1=_px(at), x2=_px(at), y1=top, y2=bottom, class_="grid"))
        marks.append(_text(at, bottom + 16, _tick(t), "middle"))
    marks.append(_text(left + wide / 2, height - 6, unit, "middle", "name"))
    for index, row in enumerate(rows):
        y, start = top + each * index + 3, 0.0
        marks.append(_text(left - 8, y + each / 2 + 1, row.name, "end", "word"))
        for name, value in row.parts.items():
            title = tag("title", f"{row.name}, {name}: {number(value)} {unit}")
            length = wide * (x.share(start + value) - x.share(start))
            where = {"x": _px(left + wide * x.share(start)), "y": _px(y), "width": _px(length), "height": each - 6}
            marks.append(tag("rect", title, class_=f"s{series[name] % COLOURS}", **where))
            start += value
        marks.append(_text(left + wide * x.share(start) + 6, y + each / 2 + 1, row.end, "start", "word"))
    return join([_legend(series), _svg(height, marks)])


def _grid(x: Axis, y: Axis, left: float, top: float, wide: float, high: float) -> Markup:
    marks = []
    for t in x.ticks:
        at = left + wide * x.share(t)
        marks.append(tag("line", x1=_px(at), x2=_px(at), y1=top, y2=_px(top + high), class_="grid"))
        marks.append(_text(at, top + high + 18, _tick(t), "middle"))
    for t in y.ticks:
        at = top + high * (1 - y.share(t))
        marks.append(tag("line", x1=left, x2=_px(left + wide), y1=_px(at), y2=_px(at), class_="grid"))
        marks.append(_text(left - 8, at + 4, _tick(t), "end"))
    marks.append(_text(left + wide / 2, top + high + 42, x.name, "middle", "name"))
    turned = f"rotate(-90 16 {_px(top + high / 2)})"
    marks.append(
        tag("text", y.name, x=16, y=_px(top + high / 2), text_anchor="middle", class_="name", transform=turned)
    )
    return join(marks)


def _label(text: str, px: float, py: float, end: float, boxes: list[tuple[float, float, float]]) -> Markup:
    """Beside the point, or above or below it: the first place where no label before it is. `boxes` gets its own."""
    wide = 7.2 * len(text)
    places = [(px + 9, py + 4), (px - 9 - wide, py - 6), (px + 9, py - 12), (px + 9, py + 20), (px - 9 - wide, py + 18)]
    fitting = [(a, b) for a, b in places if a >= 76 and a + wide <= end and b > 12]
    free = [(a, b) for a, b in fitting if not any(a < q and a + wide > p and abs(b - r) < 14 for p, q, r in boxes)]
    a, b = (free or fitting or places)[0]
    boxes.append((a, a + wide, b))
    return _text(a, b, text, "start", "label")


def _legend(series: Mapping[str, int]) -> Markup:
    if len(series) < 2:
        return Markup("")
    keys = [tag("span", tag("i", class_=f"k{colour % COLOURS}"), name) for name, colour in series.items()]
    return tag("div", *keys, class_="legend")


def _path(points: Sequence[tuple[float, float]], style: str) -> Markup:
    return tag("polyline", points=" ".join(f"{_px(a)},{_px(b)}" for a, b in points), class_=style)


def _text(x: float, y: float, text: str, anchor: str, style: str = "tick") -> Markup:
    return tag("text", text, x=_px(x), y=_px(y), text_anchor=anchor, class_=style)


def _svg(height: float, marks: Sequence[Markup], width: float = WIDTH) -> Markup:
    box = f"0 0 {_px(width)} {_px(height)}"
    return tag("svg", *marks, viewBox=box, role="img", style=f"max-width:{_px(width)}px")


def _tick(value: float) -> str:
    return f"{value:,.6g}".replace("-", "\N{MINUS SIGN}")


def _px(value: float) -> str:
    return f"{value:.1f}".rstrip("0").rstrip(".")
