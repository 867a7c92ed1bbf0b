"""Which device a run is for, by name, found without importing torch where there is no GPU."""

from __future__ import annotations

import os
import platform
from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True)
class Machine:
    """Where runs are made: `gpu` is the name of its GPUs, None where it has none; `threads` that a process may use."""

    cpu: str
    gpu: str | None
    gpus: int
    threads: int


_elsewhere: list[Machine] = []


def runs_are_on(machine: Machine | None) -> None:
    """From now on runs are made on nodes like this one, and not here (None): what depends on the machine is settled by
    theirs, before a run is sent there."""
    _elsewhere[:] = [] if machine is None else [machine]


def threads() -> int:
    """The cores this process may use."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def cpu_name() -> str:
    """The processor's model name, e.g. `AMD EPYC 7763 64-Core Processor`."""
    cpuinfo = Path("/proc/cpuinfo")
    if cpuinfo.exists():
        for line in cpuinfo.read_text().splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()


def gpu_name() -> str | None:
    """The first CUDA device's name, or None. Torch (1.7 s) is imported only where a driver is present."""
    if not any(Path(p).exists() for p in ("/dev/nvidia0", "/dev/nvidiactl", "/dev/dxg")) and os.name == "posix":
        return None
    try:
        import torch
    except ImportError:
        return None
    return str(torch.cuda.get_device_name(0)) if torch.cuda.is_available() else None


def gpus() -> int:
    """How many CUDA devices are visible."""
    import torch

    return torch.cuda.device_count()


def resolve(wanted: str) -> tuple[str, str]:
    """(`cpu` or `cuda`, the device's model name) for `hardware.device`, of the machine where runs are made; ValueError
    where CUDA is asked for in vain."""
    there = _elsewhere[0] if _elsewhere else None
    gpu = None if wanted == "cpu" else there.gpu if there else gpu_name()
    if wanted == "cuda" and gpu is None:
        where = "on these nodes" if there else "here"
        raise ValueError(f"hardware.device=cuda: no CUDA device is visible {where}; use hardware.device=cpu")
    return ("cuda", gpu) if gpu else ("cpu", there.cpu if there else cpu_name())


def threads_of_runs() -> int:
    """The cores that a process may use where runs are made."""
    return _elsewhere[0].threads if _elsewhere else threads()


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


def host_total(root: Path = Path("/")) -> int:
    """Memory of the host in bytes, or a container's limit where that is less."""
    found = [os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")]
    for name in ("memory.max", "memory/memory.limit_in_bytes"):
        path = root / "sys/fs/cgroup" / name
        if path.exists() and (text := path.read_text().strip()) != "max":
            found.append(int(text))
    return min(found)
