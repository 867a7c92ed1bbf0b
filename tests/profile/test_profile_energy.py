"""Energy is what the counters say between resume and pause, and no number where there is no counter."""

from __future__ import annotations

import re
import sys
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
import torch

from llmsys.profile.busy import covered, summarise
from llmsys.profile.energy import Energy

CPU, GPU = torch.device("cpu"), torch.device("cuda")


def package(root: Path, number: int, joules: float, wrap: float = 1000.0) -> Path:
    """A RAPL domain, with a part of its own, which must not count a second time."""
    folder = root / f"intel-rapl:{number}"
    for path, name in ((folder, f"package-{number}"), (root / f"intel-rapl:{number}:0", "core")):
        path.mkdir(parents=True, exist_ok=True)
        (path / "name").write_text(name + "\n")
        (path / "max_energy_range_uj").write_text(str(int(wrap * 1e6)))
        (path / "energy_uj").write_text(str(int(joules * 1e6)))
    return folder / "energy_uj"


def test_what_is_used_between_resume_and_pause_counts_over_all_packages_and_wraps(tmp_path: Path) -> None:
    first, second = package(tmp_path, 0, 100.0), package(tmp_path, 1, 990.0)
    energy = Energy(CPU, tmp_path)
    assert energy.source == "the CPU with all that runs on it, RAPL (package-0, package-1)"
    energy.resume()
    first.write_text(str(int(103e6)))
    second.write_text(str(int(2e6)))  # began again at 1000
    energy.pause()
    first.write_text(str(int(500e6)))  # an evaluation
    energy.resume()
    first.write_text(str(int(501e6)))
    energy.pause()
    energy.pause()
    assert energy.joules == pytest.approx(3 + 12 + 1)


def test_without_a_counter_there_is_no_source_but_a_reason(tmp_path: Path) -> None:
    broken = package(tmp_path / "broken", 0, 1.0)
    package(tmp_path / "broken", 1, 1.0)
    broken.unlink()
    for root, why in (("none", "shows no counter"), ("broken", "mostly root alone may: .*energy_uj")):
        energy = Energy(CPU, tmp_path / root)
        energy.resume()
        energy.tick()
        energy.pause()
        assert (energy.source, energy.joules, energy.clocks) == ("", 0.0, {}), "one package alone would be a part"
        assert re.search(why, energy.why["energy_j_per_step"])


def test_a_long_stretch_is_read_before_a_counter_can_come_around_twice(tmp_path: Path) -> None:
    """Three times around 1 kJ, in steps of 0.2 s and 300 J: a reading at the end alone would see none of it."""
    now = 0.0
    counter = package(tmp_path, 0, 0.0)
    energy = Energy(CPU, tmp_path, clock=lambda: now)
    energy.resume()
    for step in range(1, 11):
        now, used = 0.2 * step, 300.0 * step
        counter.write_text(str(int(used % 1000 * 1e6)))
        energy.tick()
    energy.pause()
    assert energy.joules == pytest.approx(3000)
    assert not energy.why


def test_of_a_step_in_which_a_counter_may_have_come_around_twice_nobody_knows(tmp_path: Path) -> None:
    """A package of 1 kW comes around 1 kJ in a second."""
    now = 0.0
    package(tmp_path, 0, 0.0)
    energy = Energy(CPU, tmp_path, clock=lambda: now)
    energy.resume()
    now = 1.1
    energy.pause()
    assert (energy.source, energy.joules) == ("", 0.0)
    assert "1 s between two readings" in energy.why["energy_j_per_step"]
    energy.resume()
    energy.pause()
    assert energy.joules == 0.0, "what comes later is a part"


def test_a_reading_that_fails_half_way_leaves_no_number(tmp_path: Path) -> None:
    counter = package(tmp_path, 0, 5.0)
    energy = Energy(CPU, tmp_path)
    energy.resume()
    counter.write_text(str(int(9e6)))
    energy.pause()
    assert energy.joules == pytest.approx(4)
    energy.resume()
    counter.write_text("")
    energy.pause()
    assert (energy.source, energy.joules) == ("", 0.0)
    assert "energy_j_per_step" in energy.why


class Nvml(ModuleType):
    """What `pynvml` is for: a device whose counter and clocks are `uj` and `mhz`; `fails` names a function that does
    not answer."""

    NVML_CLOCK_SM, NVML_CLOCK_MEM = 1, 2

    class NVMLError(Exception):
        pass

    def __init__(self) -> None:
        super().__init__("pynvml")
        self.joules, self.fails, self.asked = 100.0, "", ""

    def _answer(self, name: str, value: object) -> Any:
        if self.fails == name:
            raise self.NVMLError("Not Supported")
        return value

    def nvmlInit(self) -> None:
        self._answer("init", None)

    def nvmlDeviceGetHandleByUUID(self, uuid: bytes) -> str:
        self.asked = uuid.decode()
        return "handle"

    def nvmlDeviceGetTotalEnergyConsumption(self, handle: str) -> int:
        assert handle == "handle"
        return int(self._answer("energy", self.joules * 1e3))

    def nvmlDeviceGetClockInfo(self, handle: str, kind: int) -> int:
        return int(self._answer("clocks", {1: 1410, 2: 1593}[kind]))


@pytest.fixture
def nvml(monkeypatch: pytest.MonkeyPatch) -> Nvml:
    found = Nvml()
    monkeypatch.setitem(sys.modules, "pynvml", found)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: SimpleNamespace(uuid="12-ab"))
    return found


def test_a_gpu_s_energy_and_clocks_are_nvml_s(nvml: Nvml) -> None:
    energy = Energy(GPU)
    assert (energy.source, nvml.asked) == ("this GPU, NVML's total energy counter", "GPU-12-ab")
    energy.resume()
    nvml.joules = 103.5
    energy.tick()
    energy.pause()
    nvml.joules = 200.0  # an evaluation
    energy.resume()
    nvml.joules = 201.0
    energy.pause()
    assert energy.joules == pytest.approx(4.5)
    assert energy.clocks == {"sm_clock_mhz": 1410.0, "memory_clock_mhz": 1593.0}
    assert not energy.why


def test_what_nvml_does_not_say_has_a_reason(nvml: Nvml, monkeypatch: pytest.MonkeyPatch) -> None:
    """Without a driver there is neither; a card may have clocks and no counter; a reading may fail at the end, of which
    no 0 must be made: the energy would be negative."""
    nvml.fails = "init"
    assert Energy(GPU).why == dict.fromkeys(("energy_j_per_step", "sm_clock_mhz"), "NVML: Not Supported")
    nvml.fails = "energy"
    energy = Energy(GPU)
    energy.resume()
    energy.pause()
    assert (energy.source, energy.why) == ("", {"energy_j_per_step": "NVML: Not Supported"})
    assert energy.clocks
    nvml.fails = "clocks"
    energy = Energy(GPU)
    energy.resume()
    nvml.fails = "energy"
    energy.pause()
    assert (energy.source, energy.joules) == ("", 0.0)
    nvml.fails = "clocks"
    energy = Energy(GPU)
    energy.resume()
    nvml.joules = 50.0
    energy.pause()
    assert "went back" in energy.why["energy_j_per_step"]
    assert energy.why["sm_clock_mhz"] == "NVML: Not Supported"
    monkeypatch.setitem(sys.modules, "pynvml", None)  # as where it is not installed
    assert "nvidia-ml-py" in Energy(GPU).why["energy_j_per_step"]


def test_spans_that_overlap_count_once() -> None:
    assert covered([]) == 0
    assert covered([(0, 2), (1, 3), (1.5, 1.7), (5, 6)]) == 4


def event(name: str, start: float, end: float, device: str = "CPU") -> Any:
    kind = getattr(torch.autograd.DeviceType, device)
    return SimpleNamespace(name=name, device_type=kind, time_range=SimpleNamespace(start=start, end=end))


def test_collectives_are_told_from_copies_and_from_what_only_starts_them() -> None:
    events = [
        event("gloo:all_reduce", 0, 3000),
        event("c10d::allreduce_", 0, 9000),
        event("ncclDevKernel_AllGather_RING_LL", 2000, 4000, "CUDA"),
        event("nccl:all_gather", 0, 9000),
        event("Memcpy HtoD (Pinned -> Device)", 0, 500, "CUDA"),
        event("Memcpy DtoD (Device -> Device)", 0, 9000, "CUDA"),
        event("cudaMemcpyAsync", 0, 9000),
    ]
    assert summarise(events, offloads=True) == {"communication_busy_ms": 4.0, "offload_busy_ms": 0.5}
    assert summarise(events, offloads=False) == {"communication_busy_ms": 4.0}, "a batch that is copied is no offload"
    assert summarise([], offloads=True) == {}
