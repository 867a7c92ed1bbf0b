"""Records of cells that were never run: a published record's config with other techniques, and known numbers."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

from llmsys.bench.techniques import METHODS, Techniques
from llmsys.job import Record

ROOT = Path(__file__).parents[2]
PUBLISHED = ROOT / "benchmarks" / "records" / "bench_engines"
GIB = 2**30


def cell(
    text: str,
    tokens: float = 1000.0,
    memory_gib: float = 1.0,
    *,
    status: str = "ok",
    reason: str = "",
    repeat: int = 0,
    batch: int = 4,
    world: int = 2,
    keys: dict[str, Any] | None = None,
    **more: float,
) -> Record:
    """A record of `techniques=text` with these numbers; `keys`: other settings, dotted; `more`: of the summary."""
    base = Record.read(PUBLISHED / "8a33b3f7de96")
    assert base is not None
    letters, record = Techniques.parse(text), copy.deepcopy(base)
    config = record.config
    config["model"]["attention"] = "sdpa" if letters.flash else "eager"
    config["model"]["quant"] = "nf4" if letters.quantised else "none"
    config["train"] |= {"recompute": "block" if letters.recompute else "none", "world": world, "micro_batch": batch}
    config["train"]["global_batch"] = batch * world
    config["train"]["optimizer"] = "adamw_8bit" if letters.adam8 else "adamw"
    config["method"] = {"kind": METHODS[letters.adapter]}
    if letters.adapter:
        config["method"] |= {"r": 64, "alpha": 128.0}
    config["engine"] = {"kind": "ddp" if world > 1 else "local"}
    if letters.zero:
        offload = {1: "optimizer", 2: "optimizer", 3: "optimizer+params"}[letters.zero] if letters.offload else "none"
        config["engine"] = {"kind": "deepspeed", "zero": letters.zero, "offload": offload}
    config |= {"repeat": repeat, "command": ["+exp=bench_engines", f"techniques={text}"]}
    for key, value in (keys or {}).items():
        group, _, name = key.rpartition(".")
        (config[group] if group else config)[name] = value
    record.run_id = f"{text}-{batch}-{world}-{repeat}-{sorted((keys or {}).items())}"
    record.status, record.reason = status, reason
    record.summary, record.samples = {}, {}
    if status == "ok":
        times = {"tokens_per_s": tokens, "step_ms_p50": 1e6 / tokens, "accounted_bytes": memory_gib * GIB}
        record.summary = {**times, **more}
    return record


def on_gpu(record: Record, name: str = "NVIDIA A800-SXM4-80GB", **summary: float) -> Record:
    """The record as one of a GPU, of the memory that the card has."""
    record.config["hardware"]["device"] = "cuda"
    memory = {"NVIDIA H200": 139.8}.get(name, 79.25)
    record.env |= {"device": "cuda", "device_name": name, "device_memory_gib": memory}
    record.summary |= summary
    return record


def calibration(world: int = 2, precision: str = "fp32", device: str = "", **keys: Any) -> Record:
    """A record of bench_calibrate in which all arithmetic goes at 10 GFLOP/s, and memory at 5 GB/s."""
    record = cell("F", world=world, keys={"train.precision": precision, "train.length": 512, **keys})
    record.task = record.name = "bench_calibrate"
    record.world = world
    rates = {f"rate/product/{precision}/{size:.6g}": 1e10 for size in (1e5, 1e9)}
    record.summary = {**rates, "rate/stream/1000": 5e9, "start/forward": 1e-6, "start/backward": 1e-6}
    record.summary |= {"mem_gib": 16.0, "host_gib": 16.0, f"peak_tflops/{precision}": 0.02, "copy_gb_per_s": 8.0}
    record.summary |= {"host_adam_gb_per_s": 4.0, "data_ms": 2.0}
    if device:
        record.env = {**record.env, "device_name": device}
    return record
