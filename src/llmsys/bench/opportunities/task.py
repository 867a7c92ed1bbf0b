"""The task `bench_opportunities`."""

from __future__ import annotations

import re
import statistics
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from llmsys import schema
from llmsys.bench.modules import task as modules
from llmsys.bench.opportunities import changes, tables, verify
from llmsys.bench.opportunities.least import bytes_by_row
from llmsys.bench.opportunities.ranking import Opportunity, ranking
from llmsys.bench.ops import transfers
from llmsys.bench.ops.clock import Clock
from llmsys.cost import cards, hardware
from llmsys.cost.case import Case, facts
from llmsys.job import Record
from llmsys.profile.memory import GIB

if TYPE_CHECKING:
    from llmsys.context import Context

COPIED = 2**26
"""Bytes of a tensor by whose copy a memory's speed is measured: more than caches hold."""


def opportunities(config: schema.Config, context: Context) -> dict[str, Any]:
    """`opportunities.md` and the ranking in the summary, of the run that `task.modules` names, or measured here; with
    `task.changes` what known changes would save, with `task.verify` also what they do.

    ValueError for a record that is none of `bench_modules`, and where no memory's speed is known.
    """
    task = config.task
    assert isinstance(task, schema.Opportunities)
    if task.modules is not None:
        return _of_record(config, context)
    made = modules.modules(config, context)
    clock = Clock(device=context.device, spread=0.05, least_s=0.1, most_s=1.0)
    speed, whose = _bytes_per_s(config, context.device, clock)
    summary, samples = dict(made["summary"]), dict(made["samples"])
    found = _ranked(config, summary, context.device.type, speed)
    step = summary["bare_step_ms_p50"]
    for change in changes.known(config) if task.changes else []:
        saved: dict[str, float] = {}
        if task.verify:
            took = verify.in_turns(config, context, change, clock, rounds=2 * task.rounds, warmup=task.warmup)
            gone, comes = (statistics.median(took[name]) for name in (verify.GONE, verify.COMES))
            pairs = zip(took[verify.WITHOUT], took[verify.WITH], strict=True)
            saved["saved_ms"] = statistics.median(without - with_it for without, with_it in pairs)
            saved["off_percent"] = 100 * ((gone - comes) / saved["saved_ms"] - 1)
            samples |= {f"changes/{change.name}/{name}_ms": each for name, each in took.items()}
        else:
            gone, comes = change.saves_ms(config, summary, clock)
        said = {
            "gone_ms": gone,
            "comes_ms": comes,
            "saves_ms": gone - comes,
            "saves_percent": 100 * (gone - comes) / step,
            **saved,
        }
        summary |= {f"changes/{change.name}/{key}": value for key, value in said.items()}
    summary |= _summary(found, speed)
    if context.place.rank == 0:
        notes = [f"memory: {whose}", *_notes(summary["peak_tflops"])]
        notes += [f"{change.name}: {change.setting}" for change in changes.known(config) if task.changes]
        text = tables.markdown(found, summary, config.model.name, notes)
        (context.out / "opportunities.md").write_text(text, encoding="utf-8")
    files = {"tables": "opportunities.md", "modules": "modules.md"}
    return {**made, "summary": summary, "samples": samples, "files": files}


def _of_record(config: schema.Config, context: Context) -> dict[str, Any]:
    path = Path(context.inputs["modules"])
    record = Record.read(path.parent)
    assert record is not None, path
    if record.task not in ("bench_modules", "bench_opportunities") or record.status != "ok":
        raise ValueError(f"task.modules={path}: not a finished run of bench_modules, but of {record.task}")
    theirs = schema.build(record.config)
    speed, whose = _of_machine(config, record)
    found = _ranked(theirs, record.summary, str(record.env["device"]), speed)
    summary = {**_summary(found, speed), "peak_tflops": record.summary["peak_tflops"]}
    if context.place.rank == 0:
        notes = [f"modules: run {record.run_id}", f"memory: {whose}", *_notes(summary["peak_tflops"])]
        text = tables.markdown(found, summary, theirs.model.name, notes)
        (context.out / "opportunities.md").write_text(text, encoding="utf-8")
    return {"summary": summary, "files": {"tables": "opportunities.md"}}


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


def _bytes_per_s(config: schema.Config, device: torch.device, clock: Clock) -> tuple[float, str]:
    """(bytes/s of the device's memory, in words): as given, by the card's name, or of a large copy."""
    if given := _given(config):
        return given
    if device.type == "cuda":
        reported = torch.cuda.get_device_name(device)
        name = cards.card(reported, torch.cuda.get_device_properties(device).total_memory / GIB)
        if name:
            return hardware.DEVICES[name].gb_per_s * 1e9, f"{hardware.DEVICES[name].gb_per_s:g} GB/s by the datasheet"
    kind = "d2d" if device.type == "cuda" else "host"
    for timed in transfers.memcpy([COPIED], clock, None, None):
        if timed.key.startswith(f"memcpy/{kind}/"):
            speed = 2 * timed.nbytes / timed.median_s
            return speed, f"{speed / 1e9:.3g} GB/s measured, reading and writing in a copy of {COPIED >> 20} MiB"
    raise AssertionError(kind)


def _of_machine(config: schema.Config, record: Record) -> tuple[float, str]:
    """The same of the machine that a record is of."""
    if given := _given(config):
        return given
    if "memory_gb_per_s" in record.summary:
        return record.summary["memory_gb_per_s"] * 1e9, f"{record.summary['memory_gb_per_s']:.3g} GB/s, as that run has"
    reported = str(record.env.get("device_name", "")).strip()
    names = [name for name, pattern in cards.REPORTED.items() if re.fullmatch(rf"(NVIDIA )?{pattern}", reported)]
    if not names:
        raise ValueError(f"hardware.mem_gbps: missing; of {reported} the memory's GB/s are not listed")
    return hardware.DEVICES[names[0]].gb_per_s * 1e9, f"{hardware.DEVICES[names[0]].gb_per_s:g} GB/s by the datasheet"


def _given(config: schema.Config) -> tuple[float, str] | None:
    card = hardware.named(config.hardware)
    if config.hardware.mem_gbps is not None:
        return config.hardware.mem_gbps * 1e9, f"hardware.mem_gbps={config.hardware.mem_gbps:g}"
    return (card.gb_per_s * 1e9, f"{card.title}, {card.gb_per_s:g} GB/s") if card else None
