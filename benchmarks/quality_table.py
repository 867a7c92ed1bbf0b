"""The record of `lorafa_quality` as tables: results at each rate, and over paired seeds at the best one."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import paired
from llmsys.job import Record
from llmsys.lorafa import quality
from llmsys.lorafa.quality import MIB, Line, lines

__all__ = ["MIB", "REFERENCES", "Line", "chosen_rate", "lines", "markdown", "newest", "rates", "table"]
REFERENCES = ("lora", "lora_peft", "full")


def newest(folder: Path) -> Record:
    """The record of the comparison that has the most runs below `folder`. ValueError where there is none."""
    from llmsys import results

    try:
        return quality.newest(results.read(folder))
    except ValueError as error:
        raise ValueError(f"{folder}: {error}") from error


def table(record: Record) -> str:
    """All families as Markdown."""
    return "\n\n".join(
        "\n\n".join(part for part in (_head(family), _rates(record, family), _seeds(record, family)) if part)
        for family in record.config["families"].values()
    )


def _head(family: dict[str, Any]) -> str:
    direction = "more" if family["higher"] else "less"
    experiment = next(word for word in family["overrides"] if word.startswith("+exp=")).removeprefix("+exp=")
    return f"### {family['name']}: {family['metric']} in {family['unit']}, {direction} is better ({experiment})"


def _rates(record: Record, family: dict[str, Any]) -> str:
    return rates(lines(record, family["name"]), record.config["grid"], lambda value: _number(family, value))


def rates(found: Mapping[str, Line], grid: Sequence[float], number: Callable[[float | None], str]) -> str:
    """Results on the first tuning seed, and in brackets on all of them; the rate that was chosen in bold."""
    tried = [rate for rate in grid if any(rate in line.by_rate for line in found.values())]
    rows = []
    for line in found.values():
        cells = []
        for rate in tried:
            value = line.by_rate.get(rate)
            text = "diverged" if rate in line.by_rate and value is None else number(value)
            text += f" ({number(line.finals[rate])})" if rate in line.finals else ""
            cells.append(f"**{text}**" if rate == line.numbers.get("lr") else text)
        rows.append([_name(line), *cells])
    return markdown(["on the tuning seed (on all), by learning rate", *(f"{rate:g}" for rate in tried)], rows)


def _seeds(record: Record, family: dict[str, Any]) -> str:
    found = lines(record, family["name"])
    if not any(line.by_seed for line in found.values()):
        return ""
    worst = "≥" if family["higher"] else "≤"
    header = ["over paired seeds", "trained", "accounted MiB", "lr", f"{family['metric']}, mean ± sd (seeds)"]
    header += [f"minus {name} (90 %: {worst})" for name in REFERENCES]
    header += [f"within {family['margin']:g} of {' / '.join(REFERENCES)}"]
    rows = []
    for line in found.values():
        cells = [_name(line), f"{line.numbers['trainable_params']:,.0f}"]
        cells += [
            f"{line.numbers['accounted_bytes'] / MIB:.1f}",
            chosen_rate(record.config["grid"], line),
            _result(family, line),
        ]
        verdicts = []
        for name in REFERENCES:
            theirs = found[name].by_seed if name in found and name != line.name else {}
            d = paired.difference(line.by_seed, theirs, higher=family["higher"])
            cells.append("–" if d is None else f"{_number(family, d.mean, '+')} ({_number(family, d.bound, '+')})")
            ours = line.name.startswith("lorafa")
            good = paired.within(d, family["margin"], higher=family["higher"]) if ours else None
            verdicts.append({None: "–", True: "yes", False: "no"}[good])
        rows.append([*cells, " / ".join(verdicts)])
    return markdown(header, rows)


def _name(line: Line) -> str:
    return f"{line.name}, r={line.numbers['r']:.0f}" if "r" in line.numbers else line.name


def chosen_rate(grid: Sequence[float], line: Line) -> str:
    """The rate, with what is to be known of how it was found."""
    rate = line.numbers.get("lr")
    if rate is None:
        return "–"
    if not line.numbers["settled"]:
        return f"{rate:g} (search not over)"
    return f"{rate:g} (the grid's end)" if rate in (grid[0], grid[-1]) else f"{rate:g}"


def _result(family: dict[str, Any], line: Line) -> str:
    values = list(line.by_seed.values())
    if not values:
        return "–"
    sd = _number(family, paired.deviation(values))
    return f"{_number(family, statistics.fmean(values))} ± {sd} ({len(values)})"


def _number(family: dict[str, Any], value: float | None, sign: str = "") -> str:
    """To a hundredth of the margin, about."""
    digits = 1 if family["margin"] >= 1 else 4
    return "–" if value is None else f"{value:{sign}.{digits}f}"


def markdown(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A table."""
    align = ["---", *["---:"] * (len(header) - 1)]
    return "\n".join("| " + " | ".join(cells) + " |" for cells in (header, align, *rows))
