"""Records of training as cells: what was asked of each, by its letters, and the numbers of its repeats.

A cell is one combination of techniques on so many ranks with such a batch, and all runs of it in fresh processes, of
one code: where that has changed in between, the newest counts, and the runs of the others stand beside (`older`).
`workloads` says which cells are compared. Needs no torch.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

from llmsys import schema
from llmsys.bench.techniques import METHODS, Techniques
from llmsys.cost import cards
from llmsys.job import UNFINISHED, Record
from llmsys.rows import compress
from llmsys.spread import LIMITS, Spread, spread

GIB = 2**30
Settings = dict[str, Any]
ALIKE = ("repeat", "command", "results", "reuse", "sweep.", "tracker.", "techniques", "train.seed", "train.lr_")
"""What may differ among a cell's repeats, by how the keys begin."""


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
    except (ValueError, TypeError):  # of another version of this package, or not of one
        plain = _with_defaults(record.config)
    plain.pop("server", None)  # nothing of training; older records have none
    return _flat(plain)


def _with_defaults(config: Mapping[str, Any]) -> dict[str, Any]:
    """A config with what came later at its default, though its settings would not go together any more."""
    found = dict(config)
    for group, kinds in schema.SCHEMAS.items():
        own: Mapping[str, Any] = config.get(group) or {}
        cls = kinds.get("*") or kinds.get(str(own.get("kind", "none")))
        if cls is not None and (own or group in schema.LATER):
            found[group] = {**_defaults(cls), **own}
    return found


def _defaults(cls: type) -> dict[str, Any]:
    found = {}
    for each in dataclasses.fields(cls):
        if each.default is not dataclasses.MISSING:
            found[each.name] = each.default
        elif each.default_factory is not dataclasses.MISSING:
            found[each.name] = each.default_factory()
    return found


def techniques(record: Record) -> Techniques | None:
    """The combination that a record's settings amount to; None where this version does not know them."""
    try:
        return Techniques.of(schema.build(record.config))
    except (ValueError, TypeError):
        return None


def alone(record: Record) -> Cell:
    """The cell of one record of any task."""
    return _cell([record], settings(record))


def grouped(records: Sequence[Record]) -> list[Cell]:
    """Runs that differ in nothing that a step's time or memory depends on are one cell: repeats, and other seeds or
    learning rates."""
    groups: dict[tuple[Any, ...], list[Record]] = {}
    known: dict[tuple[Any, ...], Settings] = {}
    for record in records:
        found = settings(record)
        apart = {k: str(v) for k, v in found.items() if not k.startswith(ALIKE)}
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


def _flat(values: Mapping[str, Any], prefix: str = "") -> Settings:
    out: Settings = {}
    for key, value in values.items():
        out.update(_flat(value, f"{prefix}{key}.") if isinstance(value, dict) else {prefix + key: value})
    return out
