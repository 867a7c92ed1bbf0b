"""The parts of the page that say how well a device was used, and where a rank's memory was: tables of all cells."""

from __future__ import annotations

from collections.abc import Sequence

from llmsys.bench.cells import GIB, Cell
from llmsys.bench.report import paper
from llmsys.bench.report.common import size
from llmsys.bench.report.html import Markup, count, join, measured, paragraph, table, tag
from llmsys.bench.workloads import Workload

USE = (
    ("TFLOP/s", "achieved_tflops", 1.0),
    ("MFU %", "mfu", 100.0),
    ("HFU %", "hfu", 100.0),
    ("J a step", "energy_j_per_step", 1.0),
    ("tokens/J", "tokens_per_j", 1.0),
    ("SM clock MHz", "sm_clock_mhz", 1.0),
)
"""Heading, key of the summary, scale."""
KINDS = ("weights", "gradients", "optimizer", "master", "compress", "activations", "logits", "saved", "workspace")
HELD = tuple((kind, f"{kind}_bytes", 1 / GIB) for kind in KINDS)
WHOLE = (
    ("together", "accounted_bytes", 1 / GIB),
    ("of it offloaded", "offloaded_bytes", 1 / GIB),
    ("peak", "peak_gib", 1.0),
    ("reserved", "reserved_gib", 1.0),
    ("device", "device_gib", 1.0),
    ("host peak", "host_peak_gib", 1.0),
    ("retries", "alloc_retries", 1.0),
)
Columns = Sequence[tuple[str, str, float]]


def use(workload: Workload) -> Markup:
    """Arithmetic against the device's peak, and energy where it was counted."""
    cells = [cell for cell in workload.measured if cell.of("mfu")]
    if not cells:
        return Markup("")
    peaks = dict.fromkeys(cell.record.notes.get("peak_tflops", "") for cell in cells)
    said = [tag("li", f"Peak: {text}") for text in peaks if text]
    text = (
        "Of one device. MFU: arithmetic that the method needs, over the step and the peak; HFU: with what is computed"
    )
    return join(
        [
            _table(cells, USE),
            paragraph(f"{text} again.", class_="note"),
            tag("ul", *said, class_="note") if said else "",
        ]
    )


def kinds(workload: Workload) -> Markup:
    """Memory of a rank by what it is for."""
    cells = [cell for cell in workload.measured if cell.of("weights_bytes")]
    if not cells:
        return Markup("")
    apart = all(cell.of("activations_bytes") for cell in cells if cell.of("saved_bytes"))
    held = [column for column in HELD if column[0] != "saved" or not apart]  # it is activations and logits together
    text = (
        "GiB. What is held and saved is the first rank's, peaks are of the rank that has most. Together: not workspace."
    )
    return join([_table(cells, [*held, *WHOLE]), paragraph(text, class_="note")])


def _table(cells: Sequence[Cell], columns: Columns) -> Markup:
    shown = [column for column in columns if any(cell.of(column[1]) for cell in cells)]
    rows = [
        [
            cell.label,
            size(cell),
            *(measured(cell.of(key), len(cell.records), scale) for _, key, scale in shown),
        ]
        for cell in sorted(cells, key=lambda each: paper.paper_order(each.techniques))
    ]
    return table(["", "", *(name for name, _, _ in shown)], rows, left=2)


def older(workloads: Sequence[Workload]) -> Markup:
    """Runs of other code than their cell's newest, of which no number is taken."""
    rows = [
        (cell.label, size(cell), each.code_hash, each.started, tag("td", tag("code", each.run_id)))
        for workload in workloads
        for cell in workload.cells
        for each in cell.older
    ]
    if not rows:
        return Markup("")
    text = f"{count(len(rows), 'run')} of code that has changed since: of a cell the newest code's count, none across."
    return join([paragraph(text), table(["", "", "code", "begun", "run"], rows, left=4)])
