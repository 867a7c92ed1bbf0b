"""Records of training as cells: what was asked of each, by its letters, and the numbers of its repeats.

A cell is one combination of techniques on so many ranks with such a batch, and all runs of it in fresh processes, of
one code: where that has changed in between, the newest counts, and the runs of the others stand beside (`older`). Cells
that do the same work on the same kind of device are a workload, and only these are compared with each other: model,
data, length, precision, kernels (`train.deterministic` chooses others), device and network. How many steps were timed,
the seed and what a run may use change no work. Two cells of a workload that their letters do not tell apart (`Z3` by
DeepSpeed and by FSDP2) get their difference beside them. Needs no torch.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

from llmsys import schema
from llmsys.bench.techniques import METHODS, Techniques
from llmsys.cost import cards
from llmsys.job import UNFINISHED, Record
from llmsys.rows import compress, network
from llmsys.spread import LIMITS, Spread, spread

GIB = 2**30
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

Settings = dict[str, Any]


@dataclass(frozen=True, kw_only=True)
class Cell:
    """One combination. `techniques`: None where this version does not know the settings; `name` is then engine and
    method. `records` are its repeats, at least one, all with the same status and of the same code; `older` those of
    other code, of which nothing is taken. `marks`: (letter, what else than usual does it): `("Z", "fsdp2")`. `beside`:
    what tells it from another cell of the same name and size; empty where nothing has to."""

    records: tuple[Record, ...]
    settings: Settings
    techniques: Techniques | None
    marks: tuple[tuple[str, str], ...] = ()
    beside: str = ""
    older: tuple[Record, ...] = ()

    @property
    def record(self) -> Record:
        return self.records[0]

    @property
    def name(self) -> str:
        """The letters, and by what else than usual: `Z3 (fsdp2)`."""
        if self.techniques is None:
            return f"{self.settings.get('engine.kind')}, {self.settings.get('method.kind')}"
        beside = ", ".join(mark for _, mark in self.marks)
        return f"{self.techniques} ({beside})" if beside else str(self.techniques)

    @property
    def label(self) -> str:
        return f"{self.name} ({self.beside})" if self.beside else self.name

    @property
    def ok(self) -> bool:
        return self.record.status == "ok"

    @property
    def world(self) -> int:
        return int(self.settings.get("train.world", 1))

    @property
    def batch(self) -> int:
        """Micro-batch: examples of a rank in one pass."""
        return int(self.settings.get("train.micro_batch", 1))

    @property
    def ending(self) -> str:
        """How its runs ended: `ok`, `oom (host memory)`."""
        reason = ", ".join(filter(None, (self.record.reason, "beside others" if self.record.doubtful else "")))
        return f"{self.record.status} ({reason})" if reason else self.record.status

    @property
    def unfinished(self) -> bool:
        """Begun, and nothing more was ever written: killed, or running now."""
        return self.record.reason == UNFINISHED

    @property
    def frozen(self) -> bool:
        """A quantised base without an adapter: no linear weight is trained, so this is no way to pre-train."""
        found = self.techniques
        return bool(found and found.quantised and not found.adapter)

    def of(self, key: str) -> Spread | None:
        """A number of the summary over the repeats; None unless all have it."""
        values = [record.summary[key] for record in self.records if key in record.summary]
        return spread(values) if len(values) == len(self.records) else None

    @cached_property
    def tokens(self) -> Spread | None:
        return self.of("tokens_per_s")

    @cached_property
    def memory(self) -> Spread | None:
        """Bytes of one rank: on a GPU the allocator's peak, on a CPU what is accounted for."""
        found = self.of("peak_gib") if self.kind == "cuda" else self.of("accounted_bytes")
        if found is None or self.kind != "cuda":
            return found
        return Spread(found.mean * GIB, found.sd * GIB, found.half * GIB, found.cv)

    @property
    def kind(self) -> str:
        """The kind of device, `cpu` or `cuda`."""
        return str(self.settings.get("hardware.device"))

    @property
    def card(self) -> str | None:
        """The row of `cost.hardware.DEVICES` that it ran on, by the name and the memory that the card reports; None of
        any other, and of a record that does not say how much memory it has."""
        env = self.record.env
        return cards.card(str(env.get("device_name", "")), float(env.get("device_memory_gib", 0.0)))

    @property
    def noisy(self) -> bool:
        """Whether a step's time varies more over fresh processes than it should on this kind of device."""
        step = self.of("step_ms_p50")
        return step is not None and step.cv > limit(self.kind)


def limit(kind: str) -> float:
    """The coefficient of variation that is allowed on a kind of device."""
    return LIMITS.get(kind, min(LIMITS.values()))


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


def trains(record: Record) -> bool:
    """Whether a record is of a language model's training, whatever became of it."""
    model = record.config.get("model", {})
    language = (
        record.config.get("data", {}).get("labels") in (None, []) and model.get("kind", "transformer") != "convnet"
    )
    return record.task == "train" and language and ("tokens_per_s" in record.summary or record.status != "ok")


def settings(record: Record) -> Settings:
    """A record's settings under dotted keys; those that came later at their defaults, where this version knows the
    rest."""
    try:
        plain = dataclasses.asdict(schema.build(record.config))
    except ValueError:  # of another version of this package
        plain = record.config
    return _flat(plain)


def techniques(record: Record) -> Techniques | None:
    """The combination that a record's settings amount to; None where this version does not know them."""
    try:
        return Techniques.of(schema.build(record.config))
    except ValueError:
        return None


def workloads(records: Iterable[Record]) -> list[Workload]:
    """All language models' training among `records`; the workload with most cells that ended well comes first."""
    groups: dict[tuple[Any, ...], list[Cell]] = {}
    lost: list[Cell] = []
    for cell in _cells([record for record in records if trains(record)]):
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


def alone(record: Record) -> Cell:
    """The cell of one record of any task."""
    return _cell([record], settings(record))


def _cells(records: Sequence[Record]) -> list[Cell]:
    """Runs that differ in nothing but the repeat are one cell."""
    groups: dict[tuple[Any, ...], list[Record]] = {}
    known: dict[tuple[Any, ...], Settings] = {}
    for record in records:
        found = settings(record)
        apart = {k: str(v) for k, v in found.items() if not k.startswith(("repeat", "command", "results", "reuse"))}
        apart = {k: v for k, v in apart.items() if not k.startswith(("sweep.", "tracker.", "techniques"))}
        place = (record.name, device(record), record.data_hash, record.status, *sorted(apart.items()))
        groups.setdefault(place, []).append(record)
        known.setdefault(place, found)
    return [_cell(members, known[place]) for place, members in groups.items()]


def _cell(records: Sequence[Record], found: Settings) -> Cell:
    newest = max(records, key=lambda record: record.started).code_hash
    kept = tuple(record for record in records if record.code_hash == newest)
    older = tuple(record for record in records if record.code_hash != newest)
    letters = techniques(kept[0])
    return Cell(records=kept, older=older, settings=found, techniques=letters, marks=_marks(letters, found))


def _marks(letters: Techniques | None, found: Settings) -> tuple[tuple[str, str], ...]:
    """What does a letter's work where it is not what the letter stands for; "" for compression, which has no letter."""
    if letters is None:
        return ()
    attention, recompute, quant = (found.get(f"{key}") for key in ("model.attention", "train.recompute", "model.quant"))
    marks = {
        "Z": "fsdp2" if found["engine.kind"] == "fsdp2" else "",
        "L": str(found["method.kind"]) if found["method.kind"] != METHODS[letters.adapter] else "",
        "F": str(attention) if attention == "flash_attention_2" else "",
        "R": f"recompute {recompute}" if recompute not in ("none", "block") else "",
        "Q": str(quant) if quant not in ("none", "nf4") else "",
        "": compress(found) if found.get("compress.kind", "none") != "none" else "",
    }
    return tuple((letter, mark) for letter, mark in marks.items() if mark)


def device(record: Record) -> str:
    """What the device calls itself; of a run that left no word of it, what its config says."""
    return str(record.env.get("device_name") or record.config.get("hardware", {}).get("name", "unknown device"))


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


def _flat(values: Mapping[str, Any], prefix: str = "") -> Settings:
    out: Settings = {}
    for key, value in values.items():
        out.update(_flat(value, f"{prefix}{key}.") if isinstance(value, dict) else {prefix + key: value})
    return out
