"""What can be known before anything large is loaded: the learning rate, and whether memory and time suffice.

A refusal is one message that says what is needed, what was found, and the commands that would run instead.
"""

from __future__ import annotations

import dataclasses
import math
import os
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from llmsys import schema
from llmsys.cost import flops, memory
from llmsys.errors import Refused

GIB = 2**30
PADDED = ("code_docstrings", "code_packages", "jsonl")
"""Data whose rows differ in length, so that batches carry a mask."""
MAX_CPU_S = 3600.0
"""A run predicted to take longer than this on a CPU was most likely meant for a GPU."""


def learning_rate(config: schema.Config) -> float:
    """The run's peak learning rate. ValueError names the missing entry: one method's rate must not serve another."""
    rates = config.train.lr_by_method
    if config.method.kind not in rates:
        raise ValueError(
            f"train.lr_by_method.{config.method.kind}: missing; the learning rate belongs to the method, "
            f"add e.g. train.lr_by_method.{config.method.kind}=1e-3 (there are {', '.join(rates) or 'none'})"
        )
    return rates[config.method.kind] * config.train.lr_scale


def kinds_and_peak(config: schema.Config, device: torch.device) -> tuple[dict[str, int], int]:
    """(bytes by kind, the most that is alive at once) of a training step on the device."""
    facts: dict[str, Any] = {
        "num_labels": max(2, len(config.data.labels)),
        "padded": config.data.kind in PADDED,
        "device": device.type,
    }
    parts = (config.model, config.train, config.method, config.engine)
    return memory.estimate(*parts, **facts), memory.peak_bytes(*parts, **facts)


def check_memory(config: schema.Config, device: torch.device) -> int:
    """The predicted peak in bytes, if the device has that much (or `force`); else Refused."""
    parts, need = kinds_and_peak(config, device)
    have, where = available_memory(config.hardware, device)
    if need <= have or config.force:
        return need
    kinds = ", ".join(f"{kind} {size / GIB:.2f}" for kind, size in parts.items())
    raise Refused(
        f"{config.model.name} with method={config.method.kind} needs about {need / GIB:.2f} GiB ({kinds}); "
        f"{where} has {have / GIB:.2f} GiB.\n"
        + alternatives(
            config,
            fits=lambda smaller: kinds_and_peak(smaller, device)[1] <= have,
            there=f"On a machine that has the memory, hardware.mem_gib={math.ceil(need / GIB)} says so.",
        ),
        reason="memory",
    )


def check_time(config: schema.Config, device: torch.device) -> float:
    """Predicted ms per step, a lower bound: all arithmetic at the speed of plain matrix products.

    Refused where that makes more than an hour on a CPU, unless `force`.
    """
    rate = config.hardware.tflops
    speed = rate * 1e12 if rate is not None else matmul_flops(device, config.train.precision)

    def seconds(wanted: schema.Config) -> float:
        return flops.step_flops(wanted.model, wanted.train, wanted.method) / speed

    total = seconds(config) * config.train.steps
    if device.type == "cpu" and total > MAX_CPU_S and not config.force:
        fitting = max(1, int(MAX_CPU_S / seconds(config)))
        raise Refused(
            f"{config.name}: {config.train.steps} steps of {config.model.name} need at least {total / 3600:.1f} hours "
            f"at the {speed / 1e12:.3f} TFLOP/s of this CPU; more than one hour is not begun unasked.\n"
            + alternatives(
                config,
                fits=lambda smaller: seconds(smaller) * config.train.steps <= MAX_CPU_S,
                there=f"train.steps={fitting} fits into an hour.",
            ),
            reason="time",
        )
    return seconds(config) * 1e3


def alternatives(config: schema.Config, fits: Callable[[schema.Config], bool], there: str) -> str:
    """The commands that would run: the experiment's smoke, a truncated model where one `fits`, and `force`."""
    if config.name == "scratch":  # no experiment that would choose them again
        command = f"python -m llmsys model={config.model.name} data={config.data.kind}"
    else:
        command = f"python -m llmsys +exp={config.name} data={config.data.kind}"
    command += f" method={config.method.kind}"
    if config.data.path:
        command += f" data.path={config.data.path}"
    runs = []
    if config.smoke:
        runs.append(f"{command} {' '.join(config.smoke)}")
    command += f" model.weights={config.model.weights}"
    for layers in _shorter(config.model.num_layers):
        smaller = dataclasses.replace(config, model=dataclasses.replace(config.model, num_layers=layers))
        if fits(smaller):
            runs.append(f"{command} model.num_layers={layers}")
            break
    runs.append(f"{command} force=true")
    commands = "\n".join(f"  {run}" for run in runs)
    return f"What would run:\n{commands}   # in spite of this\n{there}"


def _shorter(num_layers: int) -> list[int]:
    """Depths to try, halved each time: 32 -> 16, 8, 4, 2, 1."""
    result = []
    while num_layers > 1:
        num_layers //= 2
        result.append(num_layers)
    return result


def available_memory(hardware: schema.Hardware, device: torch.device) -> tuple[float, str]:
    """(bytes, whose) that a run may use. `hardware.mem_gib` wins; a limit on the process alone (RLIMIT_DATA) does not
    count, since it is set to see what running out of memory looks like."""
    if hardware.mem_gib is not None:
        return hardware.mem_gib * GIB, f"hardware.mem_gib={hardware.mem_gib:g}: the device"
    if device.type == "cuda":
        properties = torch.cuda.get_device_properties(device)
        return properties.total_memory, f"this {properties.name}"
    return host_available(), "this host (free now)"


def host_available(root: Path = Path("/")) -> int:
    """Free memory of the host in bytes: MemAvailable, or what a container's limit leaves where that is less."""
    found = []
    meminfo = root / "proc/meminfo"
    if meminfo.exists():
        lines = dict(line.split(":", 1) for line in meminfo.read_text().splitlines() if ":" in line)
        if "MemAvailable" in lines:
            found.append(int(lines["MemAvailable"].split()[0]) * 1024)
    for limit, used in (
        ("memory.max", "memory.current"),
        ("memory/memory.limit_in_bytes", "memory/memory.usage_in_bytes"),
    ):
        folder = root / "sys/fs/cgroup"
        if (folder / limit).exists() and (text := (folder / limit).read_text().strip()) != "max":
            stat = (folder / used).with_name("memory.stat")
            counts = dict(line.split() for line in stat.read_text().splitlines()) if stat.exists() else {}
            cached = int(counts.get("inactive_file", 0))  # file pages that the kernel drops when memory is asked for
            found.append(int(text) - int((folder / used).read_text()) + cached)
    if not found:  # not Linux
        found.append(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES"))
    return max(0, min(found))


def matmul_flops(device: torch.device, precision: str, seconds: float = 0.3) -> float:
    """Floating-point operations per second of a large matrix product here, measured for about `seconds`."""
    size = 8192 if device.type == "cuda" else 768
    dtype = torch.bfloat16 if precision == "bf16" else torch.float32
    a = torch.ones(size, size, dtype=dtype, device=device)
    out = a @ a  # starts cuBLAS or the thread pool, outside the clock
    wait(device)
    start, repeats = time.perf_counter(), 0
    while (spent := time.perf_counter() - start) < seconds:
        torch.matmul(a, a, out=out)
        wait(device)
        repeats += 1
    return 2.0 * size**3 * repeats / spent


def wait(device: torch.device) -> None:
    """Returns when the device has done all that it was given."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
