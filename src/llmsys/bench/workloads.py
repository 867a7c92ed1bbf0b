"""Workloads: cells that do the same work on the same kind of device, which alone are compared with each other.

The same work is: model, data, length, precision, kernels (`train.deterministic` chooses others), device and network.
How many steps were timed, the seed and what a run may use change no work. Two cells of a workload that their letters do
not tell apart (`Z3` by DeepSpeed and by FSDP2) get their difference beside them.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

from llmsys.bench.cells import Cell, Settings, device, grouped, trains
from llmsys.job import Record
from llmsys.rows import network

CHOSEN = (
    *("model.attention", "model.quant", "train.recompute", "train.optimizer", "train.fp8"),
    *("engine.", "method.", "compress."),
)
"""What techniques choose, and compression: settings that tell the cells of a workload apart, by how they begin."""
SIZE = ("train.micro_batch", "train.global_batch", "train.world", "train.threads")
NO_WORK = (
    *("results", "reuse", "force", "smoke", "baselines", "command", "techniques", "repeat", "sweep.", "tracker."),
    *("dispatch.", "profile.", "task.", "network.", "hardware.", "model.weights", "model.tokenizer", "model.config"),
    *("train.seed", "train.steps", "train.lr_", "train.schedule", "train.warmup_steps", "train.weight_decay"),
    *("train.checkpoint_every", "train.log_every", "train.eval_", "train.save_final", "train.resume", "train.on_nan"),
    *("train.max_skips", "train.spike_factor", "train.generate_max", "data.num_examples"),
    *("data.max_", "data.make", "data.path", "data.val_percent"),
)
"""What a step's work does not depend on, by how the keys begin. Network and device have a place of their own."""
LIMIT = "dispatch.memory_gib"
"""Tells cells apart: under a limit another batch is the largest."""


@dataclass(frozen=True, kw_only=True)
class Workload:
    """Cells that do the same work on the same kind of device; `title` names it in a line."""

    title: str
    device: str
    kind: str
    settings: Settings
    cells: tuple[Cell, ...]

    @property
    def measured(self) -> list[Cell]:
        """Cells that ended well and have a speed."""
        return [cell for cell in self.cells if cell.ok and cell.tokens]

    @property
    def memory_name(self) -> str:
        return "peak memory" if self.kind == "cuda" else "accounted memory"


def workloads(records: Iterable[Record]) -> list[Workload]:
    """All language models' training among `records`; the workload with most cells that ended well comes first."""
    groups: dict[tuple[Any, ...], list[Cell]] = {}
    lost: list[Cell] = []
    for cell in grouped([record for record in records if trains(record)]):
        if cell.record.env:
            groups.setdefault((device(cell.record), *_work(cell)), []).append(cell)
        else:
            lost.append(cell)
    for cell in lost:  # a run that was killed does not say on which device
        same = [place for place in groups if place[1:] == _work(cell)]
        groups.setdefault(same[0] if len(same) == 1 else (device(cell.record), *_work(cell)), []).append(cell)
    titles = _titles([cells[0] for cells in groups.values()])
    made = [
        Workload(
            title=title,
            device=device(cells[0].record),
            kind=cells[0].kind,
            settings=cells[0].settings,
            cells=tuple(_told_apart(cells)),
        )
        for title, cells in zip(titles, groups.values(), strict=True)
    ]
    return sorted(made, key=lambda each: -len(each.measured))


def _work(cell: Cell) -> tuple[Any, ...]:
    """What cells have in common that are compared with each other, but for the device."""
    rest = {k: str(v) for k, v in cell.settings.items() if not k.startswith((*CHOSEN, *SIZE, *NO_WORK))}
    return (cell.kind, _link(cell), *sorted(rest.items()))


def _link(cell: Cell) -> str:
    return network(cell.settings, cell.record.env.get("network", {}))


def _titles(cells: Sequence[Cell]) -> list[str]:
    """A line for each cell's workload; what it leaves out is added where two would read alike."""
    titles = []
    for cell in cells:
        found = cell.settings
        parts = [str(found.get("model.name")), f"{found.get('data.kind')} data", f"length {found.get('train.length')}"]
        parts += [str(found.get("train.precision")), *([_link(cell)] if _link(cell) != "none" else [])]
        titles.append(" · ".join([*parts, device(cell.record)]))
    for title in {title for title in titles if titles.count(title) > 1}:
        alike = [index for index, each in enumerate(titles) if each == title]
        for index, more in zip(alike, _differences([cells[i] for i in alike], (*SIZE, *CHOSEN, *NO_WORK)), strict=True):
            titles[index] += f" · {more}" if more else ""
    return titles


def _told_apart(cells: Sequence[Cell]) -> list[Cell]:
    """Cells of one workload; those of one name, size and status with what they differ in: first the limit that they
    ran under, and where that does not do it, everything."""
    groups: dict[tuple[Any, ...], list[Cell]] = {}
    for cell in cells:
        under = cell.settings.get(LIMIT) if len({each.settings.get(LIMIT) for each in cells}) > 1 else None
        beside = f"under {under:g} GiB" if under else ""
        made = dataclasses.replace(cell, beside=beside)
        groups.setdefault((made.label, cell.world, cell.batch, cell.record.status), []).append(made)
    leave = tuple(key for key in NO_WORK if key not in ("train.seed", "train.steps"))
    found = []
    for group in groups.values():
        for cell, more in zip(group, _differences(group, (*leave, "train.micro_batch", "train.world")), strict=True):
            found.append(dataclasses.replace(cell, beside=", ".join(part for part in (cell.beside, more) if part)))
    return found


def _differences(cells: Sequence[Cell], leave: tuple[str, ...]) -> list[str]:
    """For each of `cells` the settings in which they are not all alike, but for those that begin with `leave`; the
    experiment's name first."""
    if len(cells) < 2:
        return [""] * len(cells)
    every = dict.fromkeys(key for cell in cells for key in cell.settings if not key.startswith((*leave, "name")))
    differ = [key for key in every if len({str(cell.settings.get(key)) for cell in cells}) > 1]
    names = {cell.record.name for cell in cells}
    return [
        ", ".join(
            [
                *([cell.record.name] if len(names) > 1 else []),
                *(f"{key.rpartition('.')[2]} {_short(cell.settings.get(key))}" for key in differ),
            ]
        )
        for cell in cells
    ]


def _short(value: Any) -> str:
    text = str(value)
    return text if len(text) <= 24 else f"{text[:21]}..."
