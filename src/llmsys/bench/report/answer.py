"""The part of the page that comes first: which combination to take, by each goal."""

from __future__ import annotations

from llmsys.bench.cells import GIB, Cell
from llmsys.bench.report import choice, paper
from llmsys.bench.report.advised import advised
from llmsys.bench.report.choice import Choice
from llmsys.bench.report.common import change, size
from llmsys.bench.report.html import Markup, interval, join, measured, paragraph, table, tag
from llmsys.bench.workloads import Workload
from llmsys.cost.hardware import RENT

WANTED = {
    "throughput": "Most tokens a second",
    "fit": "Least memory",
    "batch": "Largest micro-batch",
    "cost": "Least cost for a token",
    "energy": "Most tokens for a joule",
}


def answer(workload: Workload) -> Markup:
    """A card for each goal: the choice, by how much, and what each of its letters is good for."""
    found = choice.choices(workload)
    cards = [_card(one, workload) for one in found]
    notes = []
    if found and any(cell.frozen for cell in workload.measured) and not found[0].best.frozen:
        notes.append("Cells with Q and no adapter train no linear weight, and are chosen for nothing.")
    if any(one.goal.name == "cost" for one in found):
        notes.append(f"Cost: {RENT}.")
    more = advised(workload)
    if not cards and not more:
        return Markup("")
    return join([tag("div", *cards, class_="cards"), *(paragraph(note, class_="note") for note in notes), more])


def _card(one: Choice, workload: Workload) -> Markup:
    best, goal = one.best, one.goal
    scale = 1 / GIB if goal.unit == "GiB" else 1.0
    shown = measured(goal.value(best), len(best.records), scale) if goal.name != "batch" else str(best.batch)
    lines = [
        tag("div", WANTED[goal.name], class_="goal"),
        tag("div", best.label, class_="choice"),
        tag("div", tag("b", shown), f" {goal.unit}", class_="value"),
        paragraph(size(best), *_others(best, goal.name, workload), class_="with"),
        paragraph(*_margin(one), *_longest(best), class_="margin"),
    ]
    if one.dropped:
        rows = [(f"without {d.letter}", change(d.speed, True), change(d.memory, False)) for d in one.dropped]
        lines.append(table(["", "tokens/s", "memory"], rows))
    return tag("div", *lines, class_="card")


def _others(best: Cell, goal: str, workload: Workload) -> list[str]:
    """The two numbers that everybody asks for, but for the one that the card is about."""
    parts = []
    if goal != "throughput" and best.tokens:
        parts.append(f"; {measured(best.tokens, len(best.records))} tokens/s")
    if goal != "fit" and best.memory:
        parts.append(f"; {measured(best.memory, len(best.records), 1 / GIB)} GiB {workload.memory_name} of a rank")
    return parts


def _longest(best: Cell) -> list[str]:
    """The phase that takes most of a step."""
    parts = paper.phases(best)
    if not parts:
        return []
    name = max(parts, key=lambda each: parts[each])
    return [f" {name.capitalize()} takes {100 * parts[name] / sum(parts.values()):.0f} % of a step."]


def _margin(one: Choice) -> list[object]:
    """The runner-up, and by how much."""
    if one.second is None or one.margin is None:
        return ["Nothing else was measured."]
    second = ["Runner-up: ", tag("b", one.second.label), f" ({size(one.second)})"]
    if one.goal.name == "batch":
        return [*second, "."]
    more = {"fit": "needs {:.1f} % more", "cost": "costs {:.1f} % more"}.get(one.goal.name)
    text = more.format(one.margin.percent) if more else f"{100 - 100 / (1 + one.margin.percent / 100):.1f} % below"
    once = min(len(one.best.records), len(one.second.records)) < 2
    known = "one of them was run once, so nobody knows how sure that is" if once else "the same in every run"
    if ends := interval(one.margin.low, one.margin.high):
        known = f"the choice is ahead by {ends} (95 %)" + ("" if one.margin.certain else ", so it may be the other way")
    return [*second, f", {text}; {known}."]
