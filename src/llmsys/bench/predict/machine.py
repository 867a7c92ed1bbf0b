"""What a prediction knows of a machine: its devices and links by `cost.hardware`, or by a calibration on the spot.

Devices are equal, each a rank's; `host_gib` is one host's memory, which all of its devices offload to. What joins them
is said by `lines`.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Set
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from llmsys import schema
from llmsys.bench.predict import lines, speeds
from llmsys.bench.predict.speeds import Curve, Speeds
from llmsys.cost import hardware, room
from llmsys.cost.links import Line
from llmsys.cost.room import GIB

COPY = 0.76
"""Share of PCIe's rate that copies from and to pinned memory reach: 12.0 of 15.75 GB/s of third generation (`PCI_BW` of
NCCL's src/graph/topo.h)."""
HOST_BYTES_PER_S = 28e9 / 0.22
"""What AdamW on a host moves, on all cores of two sockets: DeepSpeed's CPU Adam updates 10**9 parameters, 28 bytes
each, in 0.22 s (ZeRO-Offload, arXiv 2101.06840, table 4)."""


@dataclass(frozen=True, kw_only=True)
class Machine:
    """`device`: `cuda` or `cpu`, by whose rules memory and kernels go. `mem_gib` of each of `devices`; on a CPU of the
    host, which they share. `lines`: a collective's, by kind, with `all` for those that are not named.
    `copy_bytes_per_s` between device and host; `host_bytes_per_s`: the host's in AdamW. `overlaps`: whether devices
    talk while they compute. `peak`: FLOP/s by precision, for shares of it. `data_s`: what a step takes to bring its
    batch. `notes`: how these were come by. `scales`: of whole steps against the sum of their operators, `(work, start)`
    by pass.
    """

    title: str
    device: str
    mem_gib: float
    host_gib: float | None
    devices: int
    speeds: Speeds
    lines: Mapping[str, Line]
    peak: Mapping[str, float]
    copy_bytes_per_s: float
    host_bytes_per_s: float = HOST_BYTES_PER_S
    overlaps: bool = True
    data_s: float = 0.0
    usd_per_hour: float | None = None
    calibrated: bool = False
    scales: Mapping[str, tuple[float, float]] = field(default_factory=dict)
    notes: tuple[str, ...] = ()

    def line(self, kind: str) -> Line:
        return self.lines.get(kind) or self.lines["all"]

    def capacity_bytes(self, world: int) -> float:
        """What a rank may fill, of `world`, which on a CPU share one machine."""
        return room.room(self.mem_gib * GIB, cuda=self.device != "cpu", ranks=world)


def of(config: schema.Config) -> Machine:
    """The machine that a config describes, or that `task.speeds` was measured on. ValueError, which names the keys,
    where it does neither, where its card has not the precision, or where a link between machines is missing."""
    found = getattr(config.task, "speeds", None)
    if found is not None:
        return calibrated(read(found), config)
    device = hardware.described(config.hardware)
    if device is None:
        raise ValueError(
            "hardware.name=auto: a prediction is about a machine: hardware=a800x8, or hardware.mem_gib=24 "
            "hardware.tflops=100 hardware.gbps=25 of a card that is not listed, or task.speeds=<a run of "
            "bench_calibrate>"
        )
    device.peak(config.train.precision)  # a precision that it has not is said here
    line, links = lines.listed(config, device)
    whose = "as given" if config.hardware.name == "auto" else f"by its datasheet ({device.source})"
    large, by = 100 * device.reached(config.train.precision), "as others measured" if device.products else "assumed"
    notes = [
        f"speeds: {device.title}, {whose}; large products reach {large:.0f} % of it, {by} (llmsys.cost.hardware); the "
        "other shares stand in llmsys.bench.predict.speeds"
    ]
    notes += [*links, *hardware.assumed(config.hardware)]
    if config.train.fp8 and "fp8" not in device.tflops:
        notes.append("train.fp8: not known to be on this card; a run there may be refused")
    if config.hardware.host_gib is None:
        notes.append("host memory: not known (hardware.host_gib), so it is not compared")
    return Machine(
        title=_title(config, device.title),
        device="cuda",
        mem_gib=device.mem_gib,
        host_gib=config.hardware.host_gib,
        devices=config.hardware.devices,
        speeds=speeds.listed(device),
        lines={"all": line},
        peak={name: tflops * 1e12 for name, tflops in device.tflops.items()},
        copy_bytes_per_s=COPY * device.pcie_gbps * 1e9,
        usd_per_hour=device.usd_per_hour,
        notes=tuple(notes),
    )


def _title(config: schema.Config, card: str) -> str:
    devices = config.hardware.devices
    own = f"{devices} x {card}" if devices > 1 else card
    return f"{math.ceil(config.train.world / devices)} machines of {own}" if config.train.world > devices else own


def read(name: str) -> dict[str, Any]:
    """The record of a run of `bench_calibrate`: its file, or its folder. ValueError for anything else."""
    path = Path(name).expanduser()
    path = path / "record.json" if path.is_dir() else path
    try:
        record = json.loads(path.read_text(encoding="utf-8"))
    except OSError:
        raise ValueError(f"task.speeds={name}: no record.json there; it is a run of bench_calibrate") from None
    except ValueError as error:
        raise ValueError(f"task.speeds={name}: not JSON: {error}") from None
    task = record.get("task") if isinstance(record, dict) else None
    if task != "bench_calibrate" or record.get("status") != "ok":
        raise ValueError(f"task.speeds={name}: not a finished run of bench_calibrate, but of {task}")
    return dict(record)


def calibrated(record: Mapping[str, Any], config: schema.Config) -> Machine:
    """The machine of a calibration's record, for `config`. ValueError where that names another machine, or asks for a
    precision or for ranks that were not calibrated."""
    _asked(record, config, {key.split("/")[2] for key in record["summary"] if key.startswith("rate/product/")})
    return measured(record, config)


def measured(record: Mapping[str, Any], config: schema.Config) -> Machine:
    """As `calibrated`, unasked. What was not measured there (a link, where it ran on one rank) is taken from `config`,
    or assumed, and `notes` says so."""
    summary, given = record["summary"], record["config"]
    device = given["hardware"]["device"]
    values = {key: value for key, value in summary.items() if "/" in key}
    curves, starts = _curves(values), {key.partition("/")[2]: v for key, v in values.items() if key[:6] == "start/"}
    title = str(record["env"].get("device_name") or device)
    notes = [f"speeds: measured on {_ranks(record)} of {title}, run {record['run_id']}"]
    world = int(record["world"])
    devices = max(config.hardware.devices, world)
    if config.train.world > 1 and config.train.world != world:
        notes.append(f"calibrated with {world} ranks, predicted for {config.train.world}")
    joined, links = _lines(config, values, devices, summary["copy_gb_per_s"] / 4)
    notes += links * (config.train.world > 1)
    scales = {
        each: (values[f"scale/{each}/work"], values[f"scale/{each}/start"])
        for each in ("forward", "backward", "optimizer")
        if f"scale/{each}/work" in values
    }
    if not scales:
        notes.append("calibration: no whole steps (task.cells), so a step is the sum of its operators")
    if fallbacks := record.get("notes", {}).get("fallbacks"):
        notes.append(f"calibration: {fallbacks}")
    peak = {key.split("/")[1]: value * 1e12 for key, value in values.items() if key.startswith("peak_tflops/")}
    return Machine(
        title=title,
        device=device,
        mem_gib=config.hardware.mem_gib or summary["mem_gib"],
        host_gib=config.hardware.host_gib or summary["host_gib"],
        devices=devices,
        speeds=Speeds(curves=curves, start_s={**starts, "again": starts["forward"]}, behind=device == "cuda"),
        lines=joined,
        peak=peak,
        copy_bytes_per_s=summary["copy_gb_per_s"] * 1e9,
        host_bytes_per_s=summary["host_adam_gb_per_s"] * 1e9,
        overlaps=device == "cuda",
        data_s=summary.get("data_ms", 0.0) * 1e-3,
        calibrated=True,
        scales=scales,
        notes=tuple(notes),
    )


def _lines(
    config: schema.Config, values: Mapping[str, float], devices: int, assumed: float
) -> tuple[dict[str, Line], list[str]]:
    """(lines by kind of collective, how they were come by): a network's, as given, as measured, or `assumed` GB/s."""
    outer, given = lines.between(config, devices), config.hardware.gbps
    if outer is not None:
        return {"all": outer}, [f"links: {config.network.name} between machines, by which the whole ring goes"]
    if given is not None:
        return {"all": Line.of_rate(given, lines.LATENCY_S["given"])}, [f"links: {given:.3g} GB/s, as given"]
    kinds = [key.partition("/")[2] for key in values if key.startswith("alpha_s/")]
    found = {kind: Line(values[f"alpha_s/{kind}"], values[f"beta_s/{kind}"]) for kind in kinds}
    if not found:
        note = (
            f"links: not measured; {assumed:.3g} GB/s and 0.1 ms a message, assumed (hardware.gbps says another rate)"
        )
        return {"all": Line.of_rate(assumed, 1e-4)}, [note]
    return {"all": found.get("all_reduce") or next(iter(found.values())), **found}, []


def _asked(record: Mapping[str, Any], config: schema.Config, precisions: Set[str]) -> None:
    """ValueError where `config` asks for what a calibration in `precisions` cannot tell."""
    speeds = f"task.speeds={getattr(config.task, 'speeds', None) or record['run_id']}"
    hardware, train = config.hardware, config.train
    if hardware.name != "auto":
        raise ValueError(
            f"hardware.name={hardware.name}: {speeds} is another machine, the one that was calibrated; take "
            "hardware=auto with it, or leave task.speeds out"
        )
    for key in ("tflops", "mem_gbps", "host_gbps"):
        if getattr(hardware, key) is not None:
            raise ValueError(f"hardware.{key}={getattr(hardware, key):g}: {speeds} has it measured; leave one out")
    if train.precision not in precisions:
        raise ValueError(
            f"train.precision={train.precision}: {speeds} was calibrated in {', '.join(sorted(precisions))}; run "
            f"+exp=bench_calibrate train.precision={train.precision}"
        )
    world = int(record["world"])
    if record["config"]["hardware"]["device"] == "cpu" and train.world > world:
        raise ValueError(
            f"train.world={train.world}: {speeds} was calibrated with {_ranks(record)} of a CPU, whose cores they "
            f"share; run +exp=bench_calibrate engine=ddp train.world={train.world} train.global_batch={4 * train.world}"
        )


def _ranks(record: Mapping[str, Any]) -> str:
    world, threads = int(record["world"]), record["config"].get("train", {}).get("threads")
    each = f" of {threads} threads" if record["config"]["hardware"]["device"] == "cpu" and threads else ""
    return f"{world} rank{'s' * (world > 1)}{each}"


def _curves(values: Mapping[str, float]) -> dict[str, Curve]:
    """`rate/<kind>[/<precision>]/<size>` -> points, in order."""
    found: dict[str, list[tuple[float, float]]] = {}
    for key, value in values.items():
        head, _, rest = key.partition("/")
        if head == "rate":
            name, _, size = rest.rpartition("/")
            found.setdefault(name, []).append((float(size), value))
    return {name: tuple(sorted(points)) for name, points in found.items()}
