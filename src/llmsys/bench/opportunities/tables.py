"""The ranking as text: where the headroom is, and what known changes would save."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from llmsys.bench.opportunities.ranking import Opportunity

LEAST = 3.0
"""Percent of a step: by how much a prediction of a smaller saving is off, nobody can tell."""


def markdown(found: Sequence[Opportunity], summary: Mapping[str, float], model: str, notes: Sequence[str]) -> str:
    """`summary` of the record, for what changes would save."""
    best = found[0]
    head = f"# Where a training step of {model} could be faster"
    first = (
        f"**{best.row}**: {best.headroom_percent:.1f} % of the step lie above its roofline "
        f"({best.ms:.2f} ms against {best.bound_ms:.2f} of {best.by})"
        if best.bound_ms is not None
        else "No row has a roofline"
    )
    total = sum(each.headroom_percent for each in found)
    known = sum(each.share_percent for each in found if each.bound_ms is not None)
    lines = [head, "", f"{first}. All rows together {total:.0f} %, of {known:.0f} % that have one.", ""]
    return "\n".join([*lines, *_ranking(found), "", *_changes(summary), *(f"- {note}" for note in notes)]) + "\n"


def _ranking(found: Sequence[Opportunity]) -> list[str]:
    rows = [["module", "ms", "% of step", "roofline ms", "bound by", "measured / roofline", "headroom, % of step"]]
    rows.append(["---", *["---:"] * (len(rows[0]) - 1)])
    for each in found:
        cells = [each.row, f"{each.ms:.2f}", f"{each.share_percent:.1f}"]
        if each.bound_ms is None:
            cells += ["not known", "", "", ""]
        else:
            times = f"{each.ms / each.bound_ms:.1f}" if each.bound_ms else ""
            cells += [f"{each.bound_ms:.2f}", each.by, times, f"{each.headroom_percent:.1f}"]
        rows.append(cells)
    return ["| " + " | ".join(cells) + " |" for cells in rows]


def _changes(summary: Mapping[str, float]) -> list[str]:
    names = list(dict.fromkeys(key.split("/")[1] for key in summary if key.startswith("changes/")))
    if not names:
        return []
    rows = [["change", "modules that go, ms", "what comes, ms", "saves ms", "% of step", "really saved ms", "off by %"]]
    rows.append(["---", *["---:"] * (len(rows[0]) - 1)])
    for name in names:
        own = {key.split("/")[2]: value for key, value in summary.items() if key.startswith(f"changes/{name}/")}
        cells = [name, *(f"{own[key]:.2f}" for key in ("gone_ms", "comes_ms", "saves_ms"))]
        cells.append(f"{own['saves_percent']:.1f}")
        off = f"{own['off_percent']:+.1f}" if "off_percent" in own else "too small to tell"
        cells += [f"{own['saved_ms']:.2f}", off] if "saved_ms" in own else ["", ""]
        rows.append(cells)
    table = ["| " + " | ".join(cells) + " |" for cells in rows]
    return ["## Changes that are known, predicted before they are made", "", *table, ""]
