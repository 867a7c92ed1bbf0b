"""What `llmsys.bench.advise` chooses for a workload, by its runs and, of combinations without any, by predictions.

For cards that are known by name: of any other, and of a CPU, predictions need a calibration on the spot, which records
of training do not hold. Imported late, and only where there is such a card.
"""

from __future__ import annotations

from typing import Any

from llmsys import schema
from llmsys.bench.cells import GIB
from llmsys.bench.report.html import Markup, join, number, paragraph, table, tag
from llmsys.bench.workloads import Workload

GOALS = ("throughput", "fit")


def advised(workload: Workload) -> Markup:
    """A table of the choice by each goal among all combinations of the letters that were measured; "" where there is no
    advice to have."""
    best = next((cell for cell in workload.measured if cell.card and cell.techniques), None)
    if best is None:
        return Markup("")
    from llmsys.bench.advise import answer
    from llmsys.bench.predict import predict

    records = [record for cell in workload.cells for record in cell.records]
    rows = []
    try:
        for goal in GOALS:
            rows.append(_row(goal, answer(_asked(workload, goal), predict, records)))
    except ValueError as error:  # nothing to choose among, or nothing known of the model
        return paragraph(f"No advice: {error}", class_="none")
    heads = ["goal", "choice", "", "tokens/s", "GiB of a device", "binds", "runner-up", "behind by"]
    said = "Among all combinations of these letters, measured where they ran and predicted where they did not."
    return join([tag("h4", "With what was not run"), table(heads, rows, left=3), paragraph(said, class_="note")])


def _asked(workload: Workload, goal: str) -> schema.Config:
    """The question, as `bench_advise` would be asked it."""
    cells = [cell for cell in workload.measured if cell.techniques]
    letters = sorted({letter for cell in cells for letter in str(cell.techniques).split("+")} - {"Naive"})
    stage = "finetune" if any(cell.techniques and cell.techniques.adapter for cell in cells) else "pretrain"
    most = max(cells, key=lambda cell: cell.world)
    plain = most.record.config
    hardware = {**plain["hardware"], "name": most.card, "devices": most.world}
    task = {"kind": "bench_advise", "goal": goal, "stage": stage, "letters": letters}
    return schema.build({**plain, "task": task, "hardware": hardware})


def _row(goal: str, found: Any) -> list[object]:
    choice, second = found.choice, found.runner_up
    return [
        goal,
        tag("td", tag("b", choice), class_="w"),
        "measured" if choice.measured else "predicted",
        number(choice.tokens_per_s),
        number(choice.peak_bytes / GIB),
        choice.binds,
        "–" if second is None else second,
        "–" if found.margin_percent is None else f"{found.margin_percent:.1f} %",
    ]
