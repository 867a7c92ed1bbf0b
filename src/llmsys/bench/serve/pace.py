"""How long passes of a model take: on their rooflines, or as they were measured on a machine (`fit`)."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, fields
from pathlib import Path

from llmsys import schema
from llmsys.bench.serve import work
from llmsys.bench.serve.fit import Fit, Point, fit
from llmsys.job import Record

PREFILL, DECODE = "prefill", "decode"


@dataclass(frozen=True, kw_only=True)
class Pace:
    """Of `model` on a device of these peaks. `fits`: by phase; without them a pass takes what its roofline says, which
    is the least that it can take. `slower`: so many times as long passes take in an engine (`slower.of_loads`)."""

    model: schema.Transformer
    flops_per_s: float
    bytes_per_s: float
    fits: Mapping[str, Fit] = field(default_factory=dict)
    slower: float = 1.0

    @property
    def sequences(self) -> int | None:
        """The most that were measured at a time; None on rooflines."""
        return self.fits[DECODE].bases[-1].batch if self.fits else None

    def least_s(self, batch: int, new: int, before: int) -> float:
        """On the rooflines of its rows, one after the other."""
        rows = work.by_row(self.model, batch, new, before)
        return sum(each.least_s(self.flops_per_s, self.bytes_per_s) for each in rows.values())

    def prefill_s(self, batch: int, tokens: int) -> float:
        """Of `batch` prompts of so many tokens each."""
        return self._seconds(PREFILL, batch, self.least_s(batch, tokens, 0))

    def decode_s(self, batch: int, before: int) -> float:
        """Of one more token of `batch` sequences, `before` of which are in the cache."""
        return self._seconds(DECODE, batch, self.least_s(batch, 1, before))

    def _seconds(self, phase: str, batch: int, least_s: float) -> float:
        return self.slower * (self.fits[phase].seconds(batch, least_s) if self.fits else least_s)


def of_record(path: Path, model: schema.Transformer, server: schema.Server) -> Pace:
    """As a run of `bench_serve_modules` has measured it. ValueError for a record that is of another task or model, or
    with other adapters beside the weights than `server` has."""
    return measured(path, model, server)[0]


def measured(path: Path, model: schema.Transformer, server: schema.Server) -> tuple[Pace, Record]:
    """As `of_record`, and what else the run has found."""
    try:
        record = Record.read(path.parent)
    except ValueError as error:
        raise ValueError(f"task.speeds: not a record: {error}") from None
    assert record is not None, path
    if record.task != "bench_serve_modules" or record.status != "ok":
        raise ValueError(
            f"task.speeds={path}: must be a finished run of bench_serve_modules, and is one of {record.task}"
        )
    config = schema.build(record.config)
    theirs, was, now = config.model, config.server.beside, server.beside
    assert isinstance(theirs, schema.Transformer)
    if was != now:
        raise ValueError(f"task.speeds={path}: passes were measured with server.adapter={was or 'none'} beside the "
                         f"weights, and not {now or 'none'}")  # fmt: skip
    if work.by_row(theirs, 2, 3, 5) != work.by_row(model, 2, 3, 5):
        pairs = ((each.name, getattr(theirs, each.name), getattr(model, each.name)) for each in fields(model))
        other = ", ".join(f"model.{key}={was} and not {now}" for key, was, now in pairs if was != now)
        raise ValueError(f"task.speeds={path}: passes of another model were measured: {other}")
    own = record.summary
    points: dict[str, list[Point]] = {PREFILL: [], DECODE: []}
    for key in (each for each in own if each.endswith("/least_ms")):
        phase, cell = key.split("/")[:2]
        points[phase].append(Point(int(cell.partition("x")[0]), own[key] / 1e3, own[f"{phase}/{cell}/ms"] / 1e3))
    pace = Pace(model=model, flops_per_s=own["peak_tflops"] * 1e12, bytes_per_s=own["peak_gbps"] * 1e9,
                fits={phase: fit(found) for phase, found in points.items()})  # fmt: skip
    return pace, record
