"""The parts of the page that say how far it can be trusted: spread, overhead, failures, and where it all comes from."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Sequence

from llmsys.bench.cells import techniques
from llmsys.bench.modules import tables
from llmsys.bench.report import quality, svg
from llmsys.bench.report.common import size
from llmsys.bench.report.html import Markup, count, details, join, measured, number, paragraph, table, tag
from llmsys.bench.workloads import Workload
from llmsys.job import UNFINISHED, Record

ERROR = 240
"""Characters of an error; the record has all."""


def modules(records: Sequence[Record]) -> Markup:
    """Every bench_modules record: bars and its table."""
    found = [record for record in records if record.task == "bench_modules" and _has_modules(record)]
    if not found:
        return paragraph("Not measured: python -m llmsys +exp=bench_modules", class_="none")
    return join(_modules(record) for record in found)


def _has_modules(record: Record) -> bool:
    return record.status == "ok" and "attributed_percent" in record.summary


def _modules(record: Record) -> Markup:
    summary, config = record.summary, record.config
    rows = []
    for row in tables.rows(summary):
        kinds = {kind: summary.get(f"modules/{row}/{kind}_ms", 0.0) for kind in ("forward", "backward", "recompute")}
        ms = summary[f"modules/{row}/ms"]
        parts = {kind: value for kind, value in kinds.items() if value} or {"whole": ms}
        rows.append(svg.Bar(name=row, parts=parts, end=f"{summary[f'modules/{row}/share_percent']:.1f} %"))
    head, *lines = tables.cells(summary)
    letters = techniques(record)
    what = [str(config["model"]["name"]), str(letters or ""), f"length {config['train']['length']}"]
    what += [f"batch {config['train']['micro_batch']}", str(record.env.get("device_name", ""))]
    enough = summary["attributed_percent"] >= quality.ATTRIBUTED
    text = f" {quality.ATTRIBUTED:.0f} % of a step or more are to be attributed. "
    return join(
        [
            tag("h3", " · ".join(part for part in what if part)),
            svg.bars(rows, "ms"),
            paragraph(verdict(enough), text, tables.costs(summary), class_="note"),
            details("The table", table(head, lines)),
        ]
    )


def verdict(good: bool) -> Markup:
    """A word with a colour."""
    return tag("span", "ok" if good else "flagged", class_="pill good" if good else "pill bad")


def spread(workload: Workload) -> Markup:
    """Cells with repeats, the least steady first."""
    cells = quality.repeated(workload)
    if not cells:
        return Markup("")
    allowed = quality.allowed(workload)
    rows = []
    for cell in cells:
        step = cell.of("step_ms_p50")
        cv = 100 * step.cv if step else 0.0
        shown = [measured(step, len(cell.records)), f"{cv:.1f} %", verdict(not cell.noisy)]
        rows.append((cell.label, size(cell), len(cell.records), *shown))
    bad = sum(cell.noisy for cell in cells)
    text = f"{count(bad, 'cell')} of {len(cells)} flagged" if bad else f"none of {count(len(cells), 'cell')} flagged"
    return join(
        [
            table(["", "", "processes", "step ms", "deviation", ""], rows, left=2),
            paragraph(f"Allowed on this kind of device: {allowed:.0f} % (deviation over mean); {text}.", class_="note"),
            _drift(workload),
        ]
    )


def _drift(workload: Workload) -> Markup:
    """Whether the machine was the same all along, by the cell that was measured most often."""
    found = quality.drifted(workload)
    if found is None:
        return Markup("")
    cell, drift = found
    during = [each.label for each in workload.measured for record in each.records if record.run_id in drift.off]
    text = f"{cell.label} was measured {drift.measured} times: drift {drift.percent:+.1f} %, at most "
    text += f"{drift.worst_percent:+.1f} % off its median. "
    text += f"Measured while it was off: {', '.join(dict.fromkeys(during))}." if during else ""
    return paragraph(text, class_="note")


def overhead(workloads: Sequence[Workload], records: Sequence[Record]) -> Markup:
    """What clocks cost, against what they may; said in every report, also where nothing was measured."""
    timed = [record for record in records if record.task == "bench_modules" and _has_modules(record)]
    found = quality.overheads(workloads, timed)
    rows = [
        (
            one.of,
            f"{number(one.percent, 2)} %",
            "–" if one.between is None else f"{number(one.between[0], 2)} to {number(one.between[1], 2)} %",
            f"{one.bound:.0f} %",
            verdict(one.within),
        )
        for one in found
    ]
    parts = [table(["", "of a step", "range", "bound", ""], rows)] if rows else []
    parts.append(paragraph("Range: over cells, or quartiles over rounds.", class_="note") if rows else Markup(""))
    if not timed:
        text = "Module spans, and timers against steps without any: not measured; python -m llmsys +exp=bench_modules"
        parts.append(paragraph(text, class_="none"))
    return join(parts)


def failures(records: Sequence[Record]) -> Markup:
    """Every record that is not ok: how many of each kind, and why."""
    failed = [record for record in records if record.status != "ok"]
    if not failed:
        return paragraph(f"None: all {count(len(records), 'record')} ended well.")
    counts = Counter(_ending(record) for record in failed)
    pills = [tag("span", f"{ending} {number}", class_="pill") for ending, number in counts.most_common()]
    unfinished = sum(record.reason == UNFINISHED for record in failed)
    note = f"{count(unfinished, 'run')} begun and not ended: killed, or still running. " if unfinished else ""
    rows = [
        (
            _what(record),
            f"{record.config.get('train', {}).get('world', 1)}",
            f"{record.config.get('train', {}).get('micro_batch', '–')}",
            _ending(record),
            tag("td", _short(record.error), class_="w"),
            tag("td", tag("code", record.run_id)),
        )
        for record in sorted(failed, key=lambda each: (each.status, each.reason, _what(each)))
    ]
    return join(
        [
            paragraph(note, "OOM is a result: that combination does not fit. ", *pills),
            details(
                f"All {count(len(failed), 'record')}",
                table(["", "ranks", "micro-batch", "ended", "why", "run"], rows),
            ),
        ]
    )


def _ending(record: Record) -> str:
    return f"{record.status} ({record.reason})" if record.reason else record.status


def _what(record: Record) -> str:
    letters = record.config.get("techniques")
    model = record.config.get("model", {}).get("name", "")
    return ", ".join(str(part) for part in (record.name, model, letters) if part)


def _short(error: str) -> str:
    line = " ".join(error.split())
    return line if len(line) <= ERROR else f"{line[: ERROR - 1]}…"


def advice(records: Sequence[Record]) -> Markup:
    """What records of bench_advise and bench_predict say of machines that need not be at hand."""
    rows = []
    for record in records:
        if record.status != "ok" or record.task not in ("bench_advise", "bench_predict"):
            continue
        found, config = record.summary, record.config
        machine = str(config.get("hardware", {}).get("name", ""))
        devices = config.get("hardware", {}).get("devices", 1)
        asked = config.get("task", {}).get("goal", "") if record.task == "bench_advise" else "this one"
        chosen = record.notes.get("choice") or config.get("techniques") or config.get("engine", {}).get("kind", "")
        speed = found.get("predicted_tokens_per_s", found.get("tokens_per_s"))
        peak = found.get("predicted_peak_gib", found.get("peak_gib"))
        rows.append(
            (
                config.get("model", {}).get("name", ""),
                f"{devices} x {machine}",
                asked,
                tag("td", tag("b", chosen), class_="w"),
                found.get("micro_batch", config.get("train", {}).get("micro_batch", "–")),
                "–" if speed is None else number(speed),
                "–" if peak is None else number(peak),
                record.notes.get("binds", "–"),
                _ahead(record),
            )
        )
    if not rows:
        return Markup("")
    heads = ["model", "machine", "goal", "choice", "bs", "tokens/s", "GiB", "binds", "ahead by"]
    return join([tag("h3", "Advice and predictions"), table(heads, rows, left=3)])


def _ahead(record: Record) -> str:
    if "margin_percent" not in record.summary:
        return "–"
    return f"{record.summary['margin_percent']:.1f} % {record.notes.get('margin_percent', '')}".rstrip()


def origin(records: Sequence[Record]) -> Markup:
    """Machines, versions and commands of the records, and tasks that this page has nothing of."""
    machines = _distinct(
        (
            record.env.get("device_name", ""),
            f"{record.env.get('cores', '–')} cores, {record.env.get('memory_gib', '–')} GiB",
            record.env.get("platform", ""),
            record.env.get("driver", "") or "–",
            _packages(record),
            _commit(record),
        )
        for record in records
        if record.env
    )
    heads = ["device", "host", "system", "driver", "packages", "commit", "records"]
    commands = Counter(_command(record) for record in records if record.config.get("command"))
    variables = _distinct((key, value) for record in records for key, value in record.env.get("variables", {}).items())
    tasks = Counter(record.task for record in records)
    said = _distinct((key, text) for record in records for key, text in record.notes.items())
    return join(
        [
            table(heads, machines, left=6),
            paragraph(", ".join(f"{count(n, 'record')} of {task}" for task, n in tasks.most_common()) + "."),
            details("Commands", tag("pre", "\n".join(f"python -m llmsys {c}" for c in commands))) if commands else "",
            details("Environment variables that change speed", table(["", "", "records"], variables, left=2))
            if variables
            else "",
            details("What records say of their numbers", table(["", "", "records"], said, left=2)) if said else "",
        ]
    )


def _packages(record: Record) -> str:
    found = record.env.get("packages", {})
    return ", ".join(f"{name} {found[name]}" for name in ("torch", "transformers", "deepspeed") if name in found)


def _commit(record: Record) -> str:
    sha = str(record.env.get("git_sha", ""))[:12]
    return f"{sha}{' + changes' if record.env.get('git_dirty') else ''}" if sha else "–"


def _command(record: Record) -> str:
    return " ".join(str(word) for word in record.config["command"])


def _distinct(rows: Iterable[tuple[object, ...]]) -> list[tuple[object, ...]]:
    """Each once, with how often."""
    return [(*row, number) for row, number in Counter(rows).items()]
