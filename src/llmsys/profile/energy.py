"""Energy of the training steps, from counters that hardware keeps: nothing is sampled, so nothing is missed between
samples.

A GPU counts millijoules since the driver was loaded (NVML, Volta and later), and is read through `pynvml` where that is
installed (package nvidia-ml-py). A CPU counts microjoules of each package (RAPL), in files under /sys/class/powercap
that most systems let only root read. Where neither can be read there is no number. A CPU's count is of all that it
does, other processes and the other ranks included.
"""

from __future__ import annotations

import contextlib
import importlib.util
from pathlib import Path
from typing import Any

import torch

POWERCAP = Path("/sys/class/powercap")


class Energy:
    """Joules between each `resume` and the next `pause`, summed in `joules`; `source` says of what, "" where nothing
    counts. `clocks` of a GPU as they were at the last `pause`, behind its last step. Reading takes some microseconds
    and happens nowhere else."""

    def __init__(self, device: torch.device, powercap: Path = POWERCAP) -> None:
        self._gpu = nvml_handle(device) if device.type == "cuda" else None
        self._packages = [] if device.type == "cuda" else _packages(powercap)
        self.source = ""
        if self._gpu is not None and self._counter() is not None:
            self.source = "this GPU, NVML's total energy counter"
        elif self._packages:
            names = ", ".join((folder / "name").read_text().strip() for folder in self._packages)
            self.source = f"the CPU with all that runs on it, RAPL ({names})"
        self.joules = 0.0
        self.clocks: dict[str, float] = {}
        self._begun: list[float] | None = None

    def resume(self) -> None:
        """From here on energy counts."""
        if self.source and self._begun is None:
            self._begun = self._read()

    def pause(self) -> None:
        """What is used from here on, until `resume`, does not count."""
        if self._gpu is not None:
            self.clocks = _clocks(self._gpu)
        if self._begun is None:
            return
        for before, now, wrap in zip(self._begun, self._read(), self._wraps(), strict=True):
            self.joules += now - before if now >= before else now + wrap - before
        self._begun = None

    def _read(self) -> list[float]:
        if self._gpu is not None:
            return [self._counter() or 0.0]
        return [int((folder / "energy_uj").read_text()) / 1e6 for folder in self._packages]

    def _wraps(self) -> list[float]:
        """Where each counter begins again at 0."""
        if self._gpu is not None:
            return [0.0]  # 64 bits of millijoules
        return [int((folder / "max_energy_range_uj").read_text()) / 1e6 for folder in self._packages]

    def _counter(self) -> float | None:
        """Joules; None on a GPU without the counter."""
        import pynvml

        with contextlib.suppress(pynvml.NVMLError):
            return float(pynvml.nvmlDeviceGetTotalEnergyConsumption(self._gpu)) / 1e3
        return None


def _packages(powercap: Path) -> list[Path]:
    """The RAPL domains of whole packages (`intel-rapl:0`, not its parts `intel-rapl:0:1`) that may be read."""
    found = []
    for folder in sorted(powercap.glob("intel-rapl:*")):
        if folder.name.count(":") == 1 and (folder / "name").is_file():
            with contextlib.suppress(OSError, ValueError):
                int((folder / "energy_uj").read_text())
                int((folder / "max_energy_range_uj").read_text())
                found.append(folder)
    return found


def nvml_handle(device: torch.device) -> Any:
    """NVML's handle of a CUDA device, by its UUID, since NVML counts devices that CUDA_VISIBLE_DEVICES hides; None
    without `pynvml` or a driver."""
    if importlib.util.find_spec("pynvml") is None:
        return None
    import pynvml

    with contextlib.suppress(pynvml.NVMLError):
        pynvml.nvmlInit()
        uuid = str(torch.cuda.get_device_properties(device).uuid)
        return pynvml.nvmlDeviceGetHandleByUUID((uuid if uuid.startswith(("GPU-", "MIG-")) else f"GPU-{uuid}").encode())
    return None


def _clocks(handle: Any) -> dict[str, float]:
    """`sm_clock_mhz` and `memory_clock_mhz` at this moment; {} where NVML does not say."""
    import pynvml

    with contextlib.suppress(pynvml.NVMLError):
        kinds = {"sm_clock_mhz": pynvml.NVML_CLOCK_SM, "memory_clock_mhz": pynvml.NVML_CLOCK_MEM}
        return {key: float(pynvml.nvmlDeviceGetClockInfo(handle, kind)) for key, kind in kinds.items()}
    return {}
