"""The page: one HTML file with its style in it, no script, and nothing that is fetched from anywhere."""

from __future__ import annotations

from collections.abc import Sequence

from llmsys.bench import workloads
from llmsys.bench.report import answer, charts, costs, layout, trust
from llmsys.bench.report.common import each
from llmsys.bench.report.html import Markup, count, join, paragraph, tag
from llmsys.bench.report.predicted import predicted
from llmsys.bench.report.style import STYLE
from llmsys.bench.workloads import Workload
from llmsys.job import Record

GRID = "python -m llmsys sweep=bench_pretrain_grid"
GRIDS = "a grid of combinations has them"


def page(records: Sequence[Record], source: str) -> str:
    """The report of `records`; `source` says in words where they lie. Pure: the same records give the same page."""
    found = workloads.workloads(records)
    parts = [
        ("answer", "The answer", _answer(found, records)),
        ("pareto", "Speed over memory", each(found, charts.pareto, f"No two cells with speed and memory: {GRID}")),
        (
            "letters",
            "What each letter does",
            each(found, charts.letters, f"No pairs that differ in one letter: {GRID}"),
        ),
        ("tables", "The paper's tables", layout.tables(found)),
        ("phases", "Phases of a step", each(found, charts.phases, f"No cell has times of phases: {GRID}")),
        ("memory", "Memory by kind", each(found, costs.kinds, f"No cell says what its memory is for: {GRID}")),
        ("use", "Use of the device", each(found, costs.use, f"No cell has MFU and HFU: {GRID}")),
        ("modules", "Modules", trust.modules(records)),
        (
            "predicted",
            "Predicted against measured",
            each(found, lambda one: predicted(one, records), f"Nothing was measured that could be predicted: {GRID}"),
        ),
        ("spread", "Spread over repeats", each(found, trust.spread, f"Nothing was repeated: {GRID} sweep.repeats=5")),
        ("overhead", "What looking costs", trust.overhead(found, records)),
        ("failures", "Failures", trust.failures(records)),
        ("origin", "Where this comes from", join([costs.older(found), trust.origin(records)])),
    ]
    title = _title(found)
    links = [tag("a", name, href=f"#{key}") for key, name, _ in parts]
    body = [
        tag("header", tag("h1", title), paragraph(_line(records, source), class_="note"), _tiles(found, records)),
        tag("nav", *links),
        *(tag("section", tag("h2", name), part, id=key) for key, name, part in parts),
        tag("footer", paragraph("Made by python -m llmsys.bench.report from records alone.", class_="note")),
    ]
    head = [
        Markup('<meta charset="utf-8"><meta name="viewport" content="width=device-width, initial-scale=1">'),
        Markup('<meta name="color-scheme" content="light dark">'),
        tag("title", title),
        tag("style", Markup(STYLE)),
    ]
    html = tag("html", tag("head", *head), tag("body", tag("main", *body)), lang="en")
    return f"<!doctype html>\n{html}\n"


def _title(found: Sequence[Workload]) -> str:
    if not found:
        return "Benchmark of training"
    models = list(dict.fromkeys(str(each.settings.get("model.name")) for each in found))
    names = ", ".join(models[:3]) + (f" and {len(models) - 3} more" if len(models) > 3 else "")
    devices = list(dict.fromkeys(each.device for each in found))
    return f"Training {names} on {', '.join(devices[:2])}{' and others' if len(devices) > 2 else ''}"


def _line(records: Sequence[Record], source: str) -> str:
    days = sorted(record.started[:10] for record in records if record.started)
    when = f", {days[0]}" + (f" to {days[-1]}" if days[-1] != days[0] else "") if days else ""
    return f"{count(len(records), 'record')} from {source}{when}. Tokens/s are of all ranks, memory is of one rank."


def _tiles(found: Sequence[Workload], records: Sequence[Record]) -> Markup:
    """The counts that a reader looks for first."""
    measured = sum(len(each.measured) for each in found)
    ended = [record for record in records if record.status != "ok"]
    noisy = sum(cell.noisy for each in found for cell in each.measured)
    tiles = [
        (measured, "cells measured" if measured != 1 else "cell measured", ""),
        (sum(record.status == "oom" for record in ended), "out of memory", ""),
        (sum(record.status != "oom" for record in ended), "ended otherwise", ""),
        (noisy, "too noisy", "bad" if noisy else ""),
    ]
    return tag(
        "div",
        *(tag("div", tag("b", n), tag("span", t), class_=f"tile {s}".strip()) for n, t, s in tiles),
        class_="tiles",
    )


def _answer(found: Sequence[Workload], records: Sequence[Record]) -> Markup:
    nothing = f"No workload has two cells to choose between; {GRIDS}: {GRID}"
    said = each(found, answer.answer, nothing)
    return join([said, trust.advice(records)])
