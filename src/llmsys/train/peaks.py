"""What the device at hand can do at most, for shares of it: its arithmetic, its memory, its links.

One source for all who quote a share, so that a record's `mfu`, a module's `peak_percent` and a roofline are of the same
peak: what `hardware` gives in numbers (with `hardware.name=auto`: beside a name they describe that machine), else the
datasheet of the card, known by its own name and memory (`cost.cards`), else, of arithmetic, the speed of a large matrix
product here. `hardware.name` is what a run is checked against and predicted for; it is never what ran.
"""

from __future__ import annotations

import functools
import time
from typing import NamedTuple

import torch

from llmsys import schema
from llmsys.cost import cards, links
from llmsys.cost.hardware import DEVICES, Device

GIB = 2**30
COPIED_BYTES = 256 << 20


class Peak(NamedTuple):
    """FLOP/s or bytes/s, and in words where that is from."""

    per_s: float
    source: str

    @property
    def measured(self) -> bool:
        """Whether it was measured here: no datasheet is behind it."""
        return self.source.startswith("measured")


def card(device: torch.device) -> Device | None:
    """The row of the GPU that calls itself so and has this memory; None of any other, and of a CPU."""
    if device.type != "cuda":
        return None
    reported = torch.cuda.get_device_name(device)
    name = cards.card(reported, torch.cuda.get_device_properties(device).total_memory / GIB)
    return DEVICES[name] if name else None


def peak_flops(config: schema.Config, device: torch.device) -> Peak:
    """FLOP/s of this rank's device in `train.precision`."""
    precision = config.train.precision
    if (given := _given(config, config.hardware.tflops)) is not None:
        return Peak(given * 1e12, f"hardware.tflops={given:g}")
    known = card(device)
    wide = precision == "fp32" and torch.get_float32_matmul_precision() != "highest"
    asked = "tf32" if wide else precision
    if known and asked in known.tflops:
        return Peak(known.peak(asked), f"{known.title} in {asked}: {known.source}")
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else device.type
    threads = torch.get_num_threads()
    speed = _measured(device, precision, threads)
    return Peak(speed, f"measured: torch.matmul in {precision} on this {name}, {threads} threads")


def memory(config: schema.Config, device: torch.device) -> Peak | None:
    """Bytes/s of the device's memory, where they are known."""
    if (given := _given(config, config.hardware.mem_gbps)) is not None:
        return Peak(given * 1e9, f"hardware.mem_gbps={given:g}")
    known = card(device)
    return Peak(known.gb_per_s * 1e9, f"{known.title}, {known.gb_per_s:g} GB/s: {known.source}") if known else None


def measured_memory(config: schema.Config, device: torch.device) -> Peak:
    """`memory`; where it is not known the speed of a large copy here, each byte read and written."""
    known = memory(config, device)
    return known or Peak(_copied(device), f"measured: a copy of {COPIED_BYTES >> 20} MiB here")


@functools.cache
def _copied(device: torch.device) -> float:
    source = torch.ones(COPIED_BYTES // 4, device=device)
    target = torch.empty_like(source)
    took = []
    for _ in range(6):  # the fastest: the others were disturbed
        wait(device)
        start = time.perf_counter()
        target.copy_(source)
        wait(device)
        took.append(time.perf_counter() - start)
    return 2 * COPIED_BYTES / min(took)


def host_link(config: schema.Config, device: torch.device) -> Peak | None:
    """Bytes/s each way between the device and its host, where they are known."""
    if (given := _given(config, config.hardware.host_gbps)) is not None:
        return Peak(given * 1e9, f"hardware.host_gbps={given:g}")
    known = card(device)
    return Peak(known.pcie_gbps * 1e9, f"PCIe of {known.title}, {known.pcie_gbps:g} GB/s each way") if known else None


def link(config: schema.Config, device: torch.device) -> Peak | None:
    """Bytes/s each way of a rank's link to the others, where they are known: of the network, or of the card where every
    one of its kind has the same. Whether a bridge joins two cards (`nvlink_ranks` of 2) nobody sees here."""
    if config.network.up_mbit is not None:
        return Peak(1 / links.Line.of_network(config.network).beta_s, f"network {config.network.name}")
    if (given := _given(config, config.hardware.gbps)) is not None:
        return Peak(given * 1e9, f"hardware.gbps={given:g}")
    known, world = card(device), config.train.world
    if known is None or known.nvlink_ranks == 2 or 1 < known.nvlink_ranks < world:
        return None
    rate = known.gbps(world)
    return Peak(rate * 1e9, f"links of {known.title}, {rate:g} GB/s each way")


def _given(config: schema.Config, number: float | None) -> float | None:
    return number if config.hardware.name == "auto" else None


@functools.cache
def _measured(device: torch.device, precision: str, threads: int) -> float:
    """The fastest of six tries: the others were disturbed. Once in a process: all its shares are of one peak."""
    return max(matmul_flops(device, precision, seconds=0.05) for _ in range(6))


def matmul_flops(device: torch.device, precision: str, seconds: float = 0.3) -> float:
    """Floating-point operations per second of a large matrix product here, measured for about `seconds`. Of random
    numbers: of ones a GPU draws less power, and runs faster. torch's random streams are left as they were."""
    size = 8192 if device.type == "cuda" else 768
    dtype = torch.bfloat16 if precision == "bf16" else torch.float32
    draw = torch.Generator(device).manual_seed(0)
    a = torch.randn(size, size, dtype=dtype, device=device, generator=draw)
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
