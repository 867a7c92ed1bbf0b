"""The task `bench_opportunities`."""

from __future__ import annotations

import statistics
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from llmsys import schema
from llmsys.bench import cells
from llmsys.bench.modules import task as modules
from llmsys.bench.opportunities import changes, tables, verify
from llmsys.bench.opportunities.changes import Change
from llmsys.bench.opportunities.least import bytes_by_row
from llmsys.bench.opportunities.ranking import Opportunity, ranking
from llmsys.bench.ops import transfers
from llmsys.bench.ops.clock import Clock
from llmsys.cost import hardware
from llmsys.cost.case import Case, facts
from llmsys.job import Record
from llmsys.train import peaks
from llmsys.train.peaks import Peak

if TYPE_CHECKING:
    from llmsys.context import Context

COPIED = 2**26
"""Bytes of a tensor by whose copy a memory's speed is measured: more than caches hold."""


def opportunities(config: schema.Config, context: Context) -> dict[str, Any]:
    """`opportunities.md` and the ranking in the summary, of the run that `task.modules` names, or measured here; with
    `task.changes` what known changes would save, with `task.verify` also what they do. Either way a saving is predicted
    from the same two times, taken in turns (`verify`).

    ValueError for a record that is none of `bench_modules`, and where no memory's speed is known.
    """
    task = config.task
    assert isinstance(task, schema.Opportunities)
    if task.modules is not None:
        return _of_record(config, context)
    made = modules.modules(config, context)
    clock = Clock(device=context.device, spread=0.05, least_s=0.1, most_s=1.0)
    summary, samples = dict(made["summary"]), dict(made["samples"])
    memory = _memory(config, context.device, clock, measured=bool(summary["peak_measured"]))
    found = _ranked(config, summary, context.device.type, memory.per_s)
    known = changes.known(config) if task.changes else []
    for name, took in _in_turns(config, context, known, clock):
        summary |= {f"changes/{name}/{key}": value for key, value in said(took, summary["bare_step_ms_p50"]).items()}
        samples |= {f"changes/{name}/{side}_ms": each for side, each in took.items()}
    summary |= _summary(found, memory.per_s)
    if context.place.rank == 0:
        notes = [f"memory: {memory.source}", *_notes(summary["peak_tflops"])]
        notes += [f"{change.name}: {change.setting}" for change in known]
        text = tables.markdown(found, summary, config.model.name, notes)
        (context.out / "opportunities.md").write_text(text, encoding="utf-8")
    files = {"tables": "opportunities.md", "modules": "modules.md"}
    sources = {**made["notes"], "memory_gb_per_s": memory.source}
    return {**made, "summary": summary, "samples": samples, "notes": sources, "files": files}


def _in_turns(
    config: schema.Config, context: Context, known: Sequence[Change], clock: Clock
) -> Iterator[tuple[str, verify.Took]]:
    """Each change that is known, and what its parts took, round by round."""
    task = config.task
    assert isinstance(task, schema.Opportunities)
    if not task.verify and known:
        took = verify.predicted(config, context, known, clock, rounds=2 * task.rounds, warmup=task.warmup)
        yield from took.items()
    for change in known if task.verify else []:
        yield change.name, verify.made(config, context, change, clock, rounds=2 * task.rounds, warmup=task.warmup)


def said(took: Mapping[str, Sequence[float]], step: float) -> dict[str, float]:
    """What a record says of a change: `gone_ms`, `comes_ms`, `saves_ms`, which is predicted, and `saves_percent` of the
    step. Where it was made also `saved_ms` and `saved_percent`, and, where that is enough to tell (`tables.LEAST`),
    `off_percent`: the prediction over what was saved."""
    gone, comes = (statistics.median(took[name]) for name in (verify.GONE, verify.COMES))
    found = {"gone_ms": gone, "comes_ms": comes, "saves_ms": gone - comes, "saves_percent": 100 * (gone - comes) / step}
    if verify.WITH not in took:
        return found
    pairs = zip(took[verify.WITHOUT], took[verify.WITH], strict=True)
    found["saved_ms"] = statistics.median(without - with_it for without, with_it in pairs)
    found["saved_percent"] = 100 * found["saved_ms"] / statistics.median(took[verify.WITHOUT])
    if abs(found["saved_percent"]) >= tables.LEAST:
        found["off_percent"] = 100 * (found["saves_ms"] / found["saved_ms"] - 1)
    return found


def _of_record(config: schema.Config, context: Context) -> dict[str, Any]:
    path = Path(context.inputs["modules"])
    record = Record.read(path.parent)
    assert record is not None, path
    if record.task not in ("bench_modules", "bench_opportunities") or record.status != "ok":
        raise ValueError(f"task.modules={path}: not a finished run of bench_modules, but of {record.task}")
    theirs = schema.build(record.config)
    flops, memory = _of_machine(config, record)
    theirs_summary = {**record.summary, "peak_tflops": flops.per_s / 1e12}
    found = _ranked(theirs, theirs_summary, str(record.env["device"]), memory.per_s)
    summary = {**_summary(found, memory.per_s), "peak_tflops": flops.per_s / 1e12}
    sources = {"peak_tflops": flops.source, "memory_gb_per_s": memory.source}
    if context.place.rank == 0:
        notes = [f"modules: run {record.run_id}", f"peak: {flops.source}", f"memory: {memory.source}"]
        notes += _notes(summary["peak_tflops"])
        text = tables.markdown(found, summary, theirs.model.name, notes)
        (context.out / "opportunities.md").write_text(text, encoding="utf-8")
    return {"summary": summary, "notes": sources, "files": {"tables": "opportunities.md"}}


def _ranked(config: schema.Config, summary: dict[str, float], device: str, speed: float) -> list[Opportunity]:
    case = Case(config.model, config.train, config.method, config.engine, **facts(config, device))
    return ranking(
        summary,
        bytes_by_row(case),
        flops_per_s=summary["peak_tflops"] * 1e12,
        bytes_per_s=speed,
        causal=config.model.objective == "causal_lm",
    )


def _summary(found: list[Opportunity], speed: float) -> dict[str, float]:
    """By row, and of all together."""
    summary = {"memory_gb_per_s": speed / 1e9, "headroom_percent": sum(each.headroom_percent for each in found)}
    summary["roofline_known_percent"] = sum(each.share_percent for each in found if each.bound_ms is not None)
    for each in found:
        if each.bound_ms is not None:
            own = {"ms": each.ms, "roofline_ms": each.bound_ms, "headroom_percent": each.headroom_percent}
            summary |= {f"opportunities/{each.row}/{key}": value for key, value in own.items()}
    return summary


def _notes(peak_tflops: float) -> list[str]:
    return [
        f"roofline of a pass: its arithmetic at {peak_tflops:.3g} TFLOP/s, or its bytes, each operand and result once "
        "(llmsys.bench.opportunities.least), whichever takes longer",
        "headroom is what the step would lose if the row ran on its roofline and nothing else changed",
    ]


def _memory(config: schema.Config, device: torch.device, clock: Clock, *, measured: bool) -> Peak:
    """Bytes/s of the device's memory: as given, the card's, or of a large copy, which is also what goes with arithmetic
    that was `measured`: a roofline's two sides are of one kind."""
    known = peaks.memory(config, device)
    if known and (config.hardware.mem_gbps is not None or not measured):
        return known
    kind = "d2d" if device.type == "cuda" else "host"
    for timed in transfers.memcpy([COPIED], clock, None, None):
        if timed.key.startswith(f"memcpy/{kind}/"):
            speed = 2 * timed.nbytes / timed.median_s
            words = f"reading and writing in a copy of {COPIED >> 20} MiB"
            return Peak(speed, f"measured: {speed / 1e9:.3g} GB/s, {words}")
    raise AssertionError(kind)


def _of_machine(config: schema.Config, record: Record) -> tuple[Peak, Peak]:
    """(FLOP/s, bytes/s) of the machine that a record is of: as `hardware` describes it, else as that run has them, else
    its card's. A peak that was measured on a card that is listed gives way to the datasheet, for its memory has none
    other. ValueError where the memory's speed is not known."""
    given, precision = config.hardware, str(record.config["train"]["precision"])
    if described := hardware.named(given):
        whose = f"hardware.name={given.name}: {described.title}"
        return Peak(described.peak(precision), whose), Peak(described.gb_per_s * 1e9, whose)
    card = cells.alone(record).card
    listed = hardware.DEVICES[card] if card else None
    flops = Peak(record.summary["peak_tflops"] * 1e12, "as that run has it")
    if given.tflops is not None:
        flops = Peak(given.tflops * 1e12, f"hardware.tflops={given.tflops:g}")
    elif listed and record.summary.get("peak_measured", 1) and precision in listed.tflops:
        flops = Peak(listed.peak(precision), f"{listed.title} in {precision}: {listed.source}")
    if given.mem_gbps is not None:
        return flops, Peak(given.mem_gbps * 1e9, f"hardware.mem_gbps={given.mem_gbps:g}")
    if "memory_gb_per_s" in record.summary:
        return flops, Peak(record.summary["memory_gb_per_s"] * 1e9, "as that run has it")
    if listed is None:
        reported = record.env.get("device_name", "")
        raise ValueError(f"hardware.mem_gbps: missing; of {reported} the memory's GB/s are not listed")
    return flops, Peak(listed.gb_per_s * 1e9, f"{listed.title}, {listed.gb_per_s:g} GB/s: {listed.source}")
