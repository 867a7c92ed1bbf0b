"""A step's modules as the paper has them: forward and backward side by side, each with its share of that pass."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from llmsys.profile import taxonomy
from llmsys.profile.taxonomy import KINDS, PHASES, REST

Summary = Mapping[str, float]
SPEEDS = ("forward_tflops", "backward_tflops", "peak_percent")


def markdown(summary: Summary, model: str, notes: Sequence[str] = ()) -> str:
    """The table, what looking has cost, and the notes."""
    lines = [f"# A training step of {model} by module", "", *_table(summary), "", costs(summary), ""]
    return "\n".join([*lines, *(f"- {note}" for note in notes)]).rstrip() + "\n"


def rows(summary: Summary) -> list[str]:
    """In the order of a forward pass, then the phases, and last what is left."""
    found = list(dict.fromkeys(key.split("/")[1] for key in summary if key.startswith("modules/")))
    last = [*PHASES, REST]
    others = [row for row in found if row not in (*taxonomy.ROWS, *last)]
    return [row for row in (*taxonomy.ROWS, *others, *last) if row in found]


def _table(summary: Summary) -> list[str]:
    head, *lines = cells(summary)
    return ["| " + " | ".join(line) + " |" for line in [head, ["---", *["---:"] * (len(head) - 1)], *lines]]


def cells(summary: Summary) -> list[list[str]]:
    """The table's head, a line for each row, and their sum."""
    found = {row: _of(summary, row) for row in rows(summary)}
    totals = {kind: sum(own.get(f"{kind}_ms", 0.0) for own in found.values()) for kind in KINDS}
    again = totals["recompute"] > 0
    head = ["module", "forward ms", "%", "backward ms", "%", *(["again ms", "%"] if again else []), "ms", "% of step"]
    head += ["TFLOP/s forward", "backward", "% of peak"]
    lines = [head]
    for row, own in found.items():
        line = [row]
        for kind in KINDS if again else KINDS[:2]:
            ms = own.get(f"{kind}_ms")
            line += ["", ""] if ms is None else [f"{ms:.2f}", f"{100 * ms / (totals[kind] or 1):.1f}"]
        line += [f"{own['ms']:.2f}", f"{own['share_percent']:.1f}"]
        line += [f"{own[key]:.3g}" if key in own else "" for key in SPEEDS]
        lines.append(line)
    whole = ["sum"]
    for kind in KINDS if again else KINDS[:2]:
        whole += [f"{totals[kind]:.2f}", "100.0"]
    ms = sum(own["ms"] for own in found.values())
    whole += [f"{ms:.2f}", f"{sum(own['share_percent'] for own in found.values()):.1f}", *[""] * len(SPEEDS)]
    return [*lines, whole]


def _of(summary: Summary, row: str) -> dict[str, float]:
    prefix = f"modules/{row}/"
    return {key.removeprefix(prefix): value for key, value in summary.items() if key.startswith(prefix)}


def costs(summary: Summary) -> str:
    """What looking has cost, in a line."""

    def quartiles(arm: str) -> str:
        low, middle, high = (summary[f"overhead/{arm}_percent{end}"] for end in ("_p25", "", "_p75"))
        return f"{middle:.1f} % ({low:.1f} to {high:.1f})"

    whose = "measured as a large product" if summary["peak_measured"] else "of the datasheet, or as given"
    peak = f"{summary['peak_tflops']:.3g} TFLOP/s, {whose}"
    return (
        f"The step takes {summary['modules_step_ms_p50']:.2f} ms (median) with clocks of modules, "
        f"{summary['step_ms_p50']:.2f} with those of phases and {summary['bare_step_ms_p50']:.2f} without any; "
        f"{summary['attributed_percent']:.1f} % of it is attributed. Overhead, round by round, median and quartiles: "
        f"phases {quartiles('phases')}, modules {quartiles('modules')}. Rows are medians, so their sum need not be the "
        f"median step. Peak: {peak}."
    )
