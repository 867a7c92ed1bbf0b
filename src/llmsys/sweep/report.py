"""What a sweep says when it ends, beside the table of its runs: repeats as one row, efficiency, limits found, drift."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from llmsys import results
from llmsys.drift import Drift, drift, seconds
from llmsys.job import Record
from llmsys.rows import Row, over_repeats, row
from llmsys.spread import LIMITS
from llmsys.sweep.course import Course, Found
from llmsys.sweep.prune import NOT_COMPARED
from llmsys.sweep.scaling import over_rounds

Table = tuple[str, list[str], list[list[str]]]
"""(title, headers, lines)"""


def tables(course: Course) -> list[Table]:
    """The tables that there is something to say in."""
    rows = [row(record) for _, record in course.records.values()]
    merged = over_repeats(rows)
    made: list[Table] = []
    if len(merged) < len(rows):
        made.append(("Over repeats", *results.table(merged)))
    if len({each["config"].get("train.world") for each in rows}) > 1 and (lines := _efficiency(rows)):
        made.append(("Scaling efficiency: tokens/s of a rank over those of one rank alone, in the same round", *lines))
    if course.found:
        made.append((f"Largest {course.settings.search_key} that runs", *_limits(course.found)))
    return made


def lines(course: Course) -> list[str]:
    """What the reference cell says of the machine, and which cells were measured while it was off."""
    found = course_drift(course)
    if found is None:
        return []
    said = [
        f"reference cell, measured {found.measured} times: median {found.median_ms:.1f} ms a step, "
        f"drift {found.percent:+.1f} % over the sweep, at most {found.worst_percent:+.1f} % off"
    ]
    for run, percent in found.off.items():
        said.append(f"measured while the reference was {percent:+.1f} % off: {course.records[run][0].label}")
    return said


def course_drift(course: Course) -> Drift | None:
    """The drift of the sweep's references; None of fewer than two."""
    times = [(seconds(each.started), each.summary["step_ms_p50"]) for each in course.references if _timed(each)]
    others = {run: seconds(r.started) for run, (_, r) in course.records.items() if _timed(r) and not _in(r, course)}
    kind = next((str(r.env.get("device")) for r in course.references), "cpu")
    return drift(times, others, LIMITS.get(kind, min(LIMITS.values())))


def _timed(record: Record) -> bool:
    return record.status == "ok" and "step_ms_p50" in record.summary


def _in(record: Record, course: Course) -> bool:
    return any(record.run_id == each.run_id for each in course.references)


def _efficiency(rows: Sequence[Row]) -> tuple[list[str], list[list[str]]] | None:
    found = sorted(over_rounds(rows), key=lambda each: each.row["config"]["train.world"])
    if not found:
        return None
    differ = _differing([each.row["config"] for each in found])
    body = [
        [
            *(str(each.row["config"].get(key)) for key in differ),
            f"{each.tokens_per_s.mean:,.0f}",
            f"{each.tokens_per_s.half:,.0f}" if each.rounds > 1 else "–",
            f"{100 * each.efficiency.mean:.1f}",
            f"{100 * each.efficiency.half:.1f}" if each.rounds > 1 else "–",
            str(each.rounds),
        ]
        for each in found
    ]
    return [*differ, "tokens/s", "± tokens/s (95 %)", "efficiency %", "± % (95 %)", "rounds"], body


def _limits(found: Sequence[Found]) -> tuple[list[str], list[list[str]]]:
    rows = [row(Record(name="", run_id="", task="", status="ok", config=each.combination.config)) for each in found]
    differ = _differing([each["config"] for each in rows])
    body = [
        [
            *(str(each["config"].get(key)) for key in differ),
            str(one.largest) if one.largest else "none",
            f"{one.record.summary['tokens_per_s']:,.0f}"
            if one.verified and one.record and "tokens_per_s" in one.record.summary
            else "–",
            "–" if one.smallest is None else str(one.smallest),
            one.why or "ran up to the limit",
            str(one.probes),
        ]
        for each, one in zip(rows, found, strict=True)
    ]
    return [*differ, "largest", "tokens/s", "smallest that did not", "why", "probes"], body


def _differing(configs: Sequence[dict[str, Any]]) -> list[str]:
    """The settings in which configs differ; where `techniques` says it, that alone."""
    keys = [key for key in dict.fromkeys(key for config in configs for key in config) if not _aside(key)]
    differ = [key for key in keys if len({str(config.get(key)) for config in configs}) > 1]
    if "techniques" not in differ:
        return differ
    set_by = ("model.attention", "model.quant", "train.recompute", "train.optimizer", "engine.", "method.")
    return [key for key in differ if not key.startswith(set_by)]


def _aside(key: str) -> bool:
    return key.split(".")[0] in NOT_COMPARED or key in ("train.lr_by_method", "train.global_batch")
