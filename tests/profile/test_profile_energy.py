"""Energy is what the counters say between resume and pause, and no number where there is no counter."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from llmsys.profile.busy import covered, summarise
from llmsys.profile.energy import Energy

CPU = torch.device("cpu")


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


def test_without_a_counter_there_is_no_source(tmp_path: Path) -> None:
    broken = package(tmp_path / "broken", 0, 1.0)
    broken.unlink()
    for root in (tmp_path / "none", tmp_path / "broken"):
        energy = Energy(CPU, root)
        energy.resume()
        energy.pause()
        assert (energy.source, energy.joules, energy.clocks) == ("", 0.0, {})


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
    assert summarise(events) == {"communication_busy_ms": 4.0, "offload_busy_ms": 0.5}
    assert summarise([]) == {}
