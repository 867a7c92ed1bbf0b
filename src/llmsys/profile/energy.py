"""Energy of the training steps, from counters that hardware keeps: nothing is sampled, so nothing is missed between
samples.

A GPU counts millijoules since the driver was loaded (NVML, Volta and later), and is read through `pynvml` (package
nvidia-ml-py, of the extra `train`). A CPU counts microjoules of each package (RAPL), in files under /sys/class/powercap
that most systems let only root read; its count is of all that it does, other processes and the other ranks included.

Where neither can be read, or a reading fails half-way, there is no number, and `why` says the reason. A package's count
begins again at 0 after some 262 kJ, twenty minutes of 200 W. So it is also read between steps (`tick`), before a
package of `MOST_W` could have come half around; of a step so long that it may have come around twice nobody knows.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, Protocol

import torch

POWERCAP = Path("/sys/class/powercap")
MOST_W = 1000.0
"""More than a CPU's package draws."""
ENERGY, CLOCK = "energy_j_per_step", "sm_clock_mhz"
"""The keys of a record's summary that reasons stand for."""


class Unreadable(Exception):
    """A counter that cannot be read; the message is the reason."""


class Counter(Protocol):
    """`source`: of what it counts. `ranges`: joules after which each part begins again at 0."""

    source: str
    ranges: Sequence[float]

    def read(self) -> list[float]:
        """Joules of each part. Unreadable says why not."""
        ...


class Packages:
    """RAPL's counters of all packages of a CPU (`intel-rapl:0`, not its parts `intel-rapl:0:1`): all or none."""

    def __init__(self, powercap: Path) -> None:
        found = sorted(powercap.glob("intel-rapl:*"))
        self._folders = [each for each in found if each.name.count(":") == 1 and (each / "name").is_file()]
        if not self._folders:
            raise Unreadable("this system shows no counter of the CPU's energy (RAPL)")
        self.ranges: Sequence[float] = self._all("max_energy_range_uj")
        names = ", ".join((folder / "name").read_text().strip() for folder in self._folders)
        self.source = f"the CPU with all that runs on it, RAPL ({names})"

    def read(self) -> list[float]:
        return self._all("energy_uj")

    def _all(self, name: str) -> list[float]:
        try:
            return [int((folder / name).read_text()) / 1e6 for folder in self._folders]
        except (OSError, ValueError) as error:
            raise Unreadable(f"the CPU's counters (RAPL) cannot be read, mostly root alone may: {error}") from error


class Card:
    """NVML's counter of one GPU, and its clocks."""

    source = "this GPU, NVML's total energy counter"
    ranges: Sequence[float] = (math.inf,)  # 64 bits of millijoules

    def __init__(self, device: torch.device) -> None:
        """By its UUID, since NVML counts devices that CUDA_VISIBLE_DEVICES hides. Unreadable without `pynvml` or a
        driver."""
        try:
            import pynvml
        except ModuleNotFoundError:
            raise Unreadable("pynvml is not installed: pip install 'llmsys[train]' or nvidia-ml-py") from None
        self._nvml = pynvml
        uuid = str(torch.cuda.get_device_properties(device).uuid)
        uuid = uuid if uuid.startswith(("GPU-", "MIG-")) else f"GPU-{uuid}"
        self._ask("nvmlInit")
        self._handle = self._ask("nvmlDeviceGetHandleByUUID", uuid.encode())

    def read(self) -> list[float]:
        return [float(self._ask("nvmlDeviceGetTotalEnergyConsumption", self._handle)) / 1e3]

    def clocks(self) -> dict[str, float]:
        """`sm_clock_mhz` and `memory_clock_mhz` at this moment. Unreadable where NVML does not say."""
        kinds = {CLOCK: self._nvml.NVML_CLOCK_SM, "memory_clock_mhz": self._nvml.NVML_CLOCK_MEM}
        return {key: float(self._ask("nvmlDeviceGetClockInfo", self._handle, kind)) for key, kind in kinds.items()}

    def _ask(self, name: str, *arguments: Any) -> Any:
        """What a function of NVML returns."""
        try:
            return getattr(self._nvml, name)(*arguments)
        except self._nvml.NVMLError as error:
            raise Unreadable(f"NVML: {error}") from error


class Energy:
    """Joules between each `resume` and the next `pause`, summed in `joules`; `source` says of what.

    `clocks` of a GPU as they were at the last `pause`, behind its last step. Where there is no energy or are no clocks,
    `source` or `clocks` is empty, and `why` has the reason under the summary's key. Reading takes some microseconds.
    """

    def __init__(
        self, device: torch.device, powercap: Path = POWERCAP, clock: Callable[[], float] = time.monotonic
    ) -> None:
        self._clock = clock
        self._card: Card | None = None
        self._counter: Counter | None = None
        self.joules, self.source = 0.0, ""
        self.clocks: dict[str, float] = {}
        self.why: dict[str, str] = {}
        self._begun: list[float] | None = None
        self._read_s = 0.0
        try:
            if device.type == "cuda":
                self._card = Card(device)
            counter = self._card or Packages(powercap)
            counter.read()
            self._counter, self.source = counter, counter.source
        except Unreadable as error:
            self._drop(str(error))
            if device.type == "cuda" and self._card is None:
                self.why[CLOCK] = str(error)

    def resume(self) -> None:
        """From here on energy counts."""
        if self._counter is not None and self._begun is None:
            self._begun = self._read()

    def tick(self) -> None:
        """Between two steps: reads where a counter may be half around since it was read last."""
        if self._begun is None or self._counter is None:
            return
        if self._clock() - self._read_s > min(self._counter.ranges) / 2 / MOST_W:
            self._count()

    def pause(self) -> None:
        """What is used from here on, until `resume`, does not count."""
        if self._card is not None:
            try:
                self.clocks = self._card.clocks()
            except Unreadable as error:
                self.clocks, self.why[CLOCK] = {}, str(error)
        if self._begun is not None:
            self._count()
            self._begun = None

    def _count(self) -> None:
        """Adds what was used since the last reading, and begins anew."""
        assert self._counter is not None
        assert self._begun is not None
        begun, since = self._begun, self._read_s
        self._begun = self._read()
        if self._begun is None:
            return
        waited = self._read_s - since
        for before, now, around in zip(begun, self._begun, self._counter.ranges, strict=True):
            if waited * MOST_W > around:
                self._drop(f"{waited:.0f} s between two readings, in which a counter may have come around twice")
                return
            if now < before and math.isinf(around):
                self._drop("the counter went back, as when the driver is loaded anew")
                return
            self.joules += now - before if now >= before else now + around - before

    def _read(self) -> list[float] | None:
        assert self._counter is not None
        try:
            found = self._counter.read()
        except Unreadable as error:
            self._drop(str(error))
            return None
        self._read_s = self._clock()
        return found

    def _drop(self, reason: str) -> None:
        """There is no number: what was counted so far is a part of it."""
        self._counter, self._begun = None, None
        self.joules, self.source = 0.0, ""
        self.why[ENERGY] = reason
