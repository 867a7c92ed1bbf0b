"""GPUs by name: what their makers promise, for predictions about machines that are not at hand.

Peaks are dense (datasheets of Ampere and Hopper print twice as much, with 2:4 sparsity) and, for fp16 and bf16 on
tensor cores, with fp32 accumulation, as training has it: on GeForce cards half of the rate with fp16 accumulation. fp32
is without TF32, torch's default. No kernel reaches a peak; a time from it is a lower bound. CPUs have no row: their
speed is measured (`train.peaks.matmul_flops`). The tests derive the peaks from cores and clocks once more.

`mem_gib` is what CUDA reports as the device's memory (as in torch's out-of-memory messages), less than its label;
`gb_per_s` memory bandwidth. Links are GB/s in each direction; a bridge joins two cards, a switch all of a machine.
`p2p`: whether cards read each other's memory over PCIe; GeForce cards of the last generations do not, so what they say
goes through the host's memory. `products`: the share of the peak that large ones reach, by precision; one that is not
there goes by bf16's (`SUSTAINED`). `fp8` is with fp32 accumulation as well, and only where there is such hardware.
`usd` is the list price at launch, `usd_per_hour` an example of what renting one costs (`RENT`); null where no price
with a date was found.
"""

from __future__ import annotations

import dataclasses
import difflib
from dataclasses import dataclass, field
from typing import Any

from llmsys import schema

SUSTAINED = 0.7
"""Assumed where nobody's measurement was found. `Device.products` has those that were: the best of torch's square
products, 1024 to 10240 wide, over the peak (third party: github.com/zzc0721/torch-performance-test-data, database.md):

    TFLOP/s         in bf16                                                        in fp32
    A100 SXM        264.5, A800 SXM 266.5, A100 40 GB 246.3 of 312                 19.2, 19.1, 18.1 of 19.5
    H100, H200      784 and 789, 790 of 989.4                                      52.1, 51.3 of 67
    RTX 4090        160 to 173, 164 in the middle, of 165.2                        54.7 of 82.6
    RTX 3090        76.3 to 76.7 of 71.0: a clock above that of the peak           24.8 of 35.6
    RTX 3080        as the RTX 3080 Ti's 76.5 of 68.2, likewise                    24.4 of 34.1
    RTX 2080 Ti     as the RTX 2080's 39.0 of 40.3, in fp16                        9.2 of 10.1

Above the peak counts as the peak. From github.com/stas00/ml-engineering (maximum achievable matmul FLOPS, bf16) A100
PCIe, 252.9 of 312; it has 271.2 for A100 SXM and 794.5 for H100 SXM, and in 8-bit floats 1402.6 of 1979 for that."""
BALANCE = 150.0
"""FLOP/s over bytes/s of a card whose memory is not described: RTX 4090 164, A100 153, RTX 3090 76, H100 295."""

RENT = (
    "RunPod's on-demand prices of 21 March 2026 as listed by deploybase.ai; other providers ask 1.3 to 4 times as much"
)

EVERY = 10**6
"""More ranks than there are."""
PCIE_3, PCIE_4, PCIE_5 = 15.75, 31.5, 63.0
"""GB/s each way of 16 lanes: 8, 16 and 32 GT/s at 128b/130b."""


@dataclass(frozen=True, kw_only=True)
class Device:
    """One GPU; units and conventions stand at the top of the file. `tflops`: peak by dtype, TOPS for int8."""

    title: str
    mem_gib: float
    gb_per_s: float
    tflops: dict[str, float]
    pcie_gbps: float
    nvlink_gbps: float = 0.0
    nvlink_ranks: int = 1
    p2p: bool = True
    products: dict[str, float] = field(default_factory=dict)
    usd: float | None = None
    usd_per_hour: float | None = None
    source: str

    def gbps(self, world: int = 2) -> float:
        """GB/s each way between `world` devices of a machine: NVLink where it joins so many."""
        return self.nvlink_gbps if self.nvlink_gbps and world <= self.nvlink_ranks else self.pcie_gbps

    def reached(self, precision: str) -> float:
        """The share of its peak in `precision` that large products reach."""
        return self.products.get(precision, self.sustained)

    @property
    def sustained(self) -> float:
        """The same in bf16."""
        return self.products.get("bf16", SUSTAINED)

    def peak(self, precision: str) -> float:
        """FLOP/s in `train.precision`. ValueError where the device has none."""
        if precision not in self.tflops:
            raise ValueError(f"train.precision={precision}: {self.title} has none; there are {', '.join(self.tflops)}")
        return self.tflops[precision] * 1e12


_TURING = "NVIDIA Turing GPU Architecture whitepaper (WP-09183-001), table 1 and appendix A, reference clocks"
_GA102 = "NVIDIA Ampere GA102 GPU Architecture whitepaper V2, table 2 and appendix A"
_ADA = "NVIDIA Ada GPU Architecture whitepaper V2.01, appendix A"
_A100 = "NVIDIA A100 Tensor Core GPU datasheet (1758950)"
_HOPPER = (
    "NVIDIA H100 Tensor Core GPU datasheet and H100 architecture whitepaper; peaks halved from those with sparsity"
)

_A100_TFLOPS = {"fp32": 19.5, "tf32": 156.0, "bf16": 312.0, "fp16": 312.0, "int8": 624.0}
_GH100_TFLOPS = {"fp32": 67.0, "tf32": 494.7, "bf16": 989.4, "fp16": 989.4, "int8": 1978.9, "fp8": 1978.9}

DEVICES: dict[str, Device] = {
    "rtx2080ti": Device(
        title="GeForce RTX 2080 Ti",
        mem_gib=10.75,
        gb_per_s=616,
        tflops={"fp32": 13.4, "fp16": 53.8, "int8": 215.2},
        pcie_gbps=PCIE_3,
        nvlink_gbps=50,
        nvlink_ranks=2,
        usd=999,
        p2p=False,
        products={"bf16": 0.97, "fp32": 0.92},
        source=f"{_TURING}; fp16 with fp32 accumulation by arithmetic, half of 107.6",
    ),
    "rtx3080": Device(
        title="GeForce RTX 3080 10 GB",
        mem_gib=9.78,
        gb_per_s=760,
        tflops={"fp32": 29.8, "tf32": 29.8, "bf16": 59.5, "fp16": 59.5, "int8": 238.0},
        pcie_gbps=PCIE_4,
        usd=699,
        p2p=False,
        products={"bf16": 1.0, "fp32": 0.71},
        source=_GA102,
    ),
    "rtx3090": Device(
        title="GeForce RTX 3090",
        mem_gib=23.69,
        gb_per_s=936,
        tflops={"fp32": 35.6, "tf32": 35.6, "bf16": 71.0, "fp16": 71.0, "int8": 284.0},
        pcie_gbps=PCIE_4,
        nvlink_gbps=56.25,
        nvlink_ranks=2,
        usd=1499,
        usd_per_hour=0.22,
        p2p=False,
        products={"bf16": 1.0, "fp32": 0.7},
        source=_GA102,
    ),
    "rtx4090": Device(
        title="GeForce RTX 4090",
        mem_gib=23.64,
        gb_per_s=1008,
        tflops={"fp32": 82.6, "tf32": 82.6, "bf16": 165.2, "fp16": 165.2, "int8": 660.6, "fp8": 330.3},
        pcie_gbps=PCIE_4,
        usd=1599,
        usd_per_hour=0.34,
        p2p=False,
        products={"bf16": 0.99, "fp32": 0.66},
        source=f"{_ADA}; fp8 with fp32 accumulation, half of 660.6",
    ),
    "a100_pcie_40gb": Device(
        title="A100 PCIe 40 GB",
        mem_gib=39.5,
        gb_per_s=1555,
        tflops=_A100_TFLOPS,
        pcie_gbps=PCIE_4,
        nvlink_gbps=300,
        nvlink_ranks=2,
        products={"bf16": 0.79, "fp32": 0.93},
        source=_A100,
    ),
    "a100_sxm_40gb": Device(
        title="A100 SXM 40 GB",
        mem_gib=39.5,
        gb_per_s=1555,
        tflops=_A100_TFLOPS,
        pcie_gbps=PCIE_4,
        nvlink_gbps=300,
        nvlink_ranks=8,
        products={"bf16": 0.79, "fp32": 0.93},
        source=_A100,
    ),
    "a100_pcie": Device(
        title="A100 PCIe 80 GB",
        mem_gib=79.25,
        gb_per_s=1935,
        tflops=_A100_TFLOPS,
        pcie_gbps=PCIE_4,
        nvlink_gbps=300,
        nvlink_ranks=2,
        usd_per_hour=1.19,
        products={"bf16": 0.81, "fp32": 0.98},
        source=_A100,
    ),
    "a100": Device(
        title="A100 SXM 80 GB",
        mem_gib=79.25,
        gb_per_s=2039,
        tflops=_A100_TFLOPS,
        pcie_gbps=PCIE_4,
        nvlink_gbps=300,
        nvlink_ranks=8,
        usd_per_hour=1.39,
        products={"bf16": 0.85, "fp32": 0.98},
        source=_A100,
    ),
    "a800": Device(
        title="A800 SXM 80 GB",
        mem_gib=79.25,
        gb_per_s=2039,
        tflops=_A100_TFLOPS,
        pcie_gbps=PCIE_4,
        nvlink_gbps=200,
        nvlink_ranks=8,
        products={"bf16": 0.85, "fp32": 0.98},
        source=f"{_A100}; the A800 differs in NVLink alone, 400 GB/s in both directions together",
    ),
    "h100_pcie": Device(
        title="H100 PCIe 80 GB",
        mem_gib=79.1,
        gb_per_s=2000,
        tflops={"fp32": 51.0, "tf32": 378.0, "bf16": 756.5, "fp16": 756.5, "int8": 1513.0, "fp8": 1513.0},
        pcie_gbps=PCIE_5,
        nvlink_gbps=300,
        nvlink_ranks=2,
        usd_per_hour=1.99,
        source=_HOPPER,
    ),
    "h100": Device(
        title="H100 SXM 80 GB",
        mem_gib=79.1,
        gb_per_s=3350,
        tflops=_GH100_TFLOPS,
        pcie_gbps=PCIE_5,
        nvlink_gbps=450,
        nvlink_ranks=8,
        usd_per_hour=2.69,
        products={"bf16": 0.8, "fp32": 0.78, "fp8": 0.71},
        source=_HOPPER,
    ),
    "h200": Device(
        title="H200 SXM 141 GB",
        mem_gib=139.8,
        gb_per_s=4800,
        tflops=_GH100_TFLOPS,
        pcie_gbps=PCIE_5,
        nvlink_gbps=450,
        nvlink_ranks=8,
        usd_per_hour=3.59,
        products={"bf16": 0.8, "fp32": 0.77, "fp8": 0.71},
        source="NVIDIA H200 Tensor Core GPU datasheet; peaks halved from those with sparsity, the H100's",
    ),
}

FP8 = tuple(name for name, device in DEVICES.items() if "fp8" in device.tflops)
"""Those that multiply 8-bit floats: Ada's and Hopper's."""


def named(hardware: schema.Hardware) -> Device | None:
    """The device of `hardware.name` with what the numbers beside it replace; None for `auto`.

    `tflops` replaces the peak of every dtype, `gbps` every link. ValueError for an unknown name.
    """
    if hardware.name == "auto":
        return None
    if hardware.name not in DEVICES:
        near = difflib.get_close_matches(hardware.name, DEVICES, n=1)
        hint = f"; did you mean {near[0]}?" if near else ""
        raise ValueError(f"hardware.name={hardware.name}: must be auto or one of {', '.join(DEVICES)}{hint}")
    return _changed(DEVICES[hardware.name], hardware)


def described(hardware: schema.Hardware) -> Device | None:
    """As `named`; of `auto` a card by its numbers, where `mem_gib` and `tflops` are given, else None.

    What else is not given is assumed: memory of `BALANCE`, PCIe 4 to the host and between cards.
    """
    if hardware.name != "auto" or hardware.mem_gib is None or hardware.tflops is None:
        return named(hardware)
    card = Device(
        title=f"a card of {hardware.mem_gib:g} GiB and {hardware.tflops:g} TFLOP/s",
        mem_gib=hardware.mem_gib,
        gb_per_s=hardware.tflops * 1e3 / BALANCE,
        tflops=dict.fromkeys(("fp32", "tf32", "bf16", "fp16", "int8"), hardware.tflops),
        pcie_gbps=PCIE_4,
        source="as given",
    )
    return _changed(card, hardware)


def assumed(hardware: schema.Hardware) -> list[str]:
    """A line for each number of `described` that nobody gave."""
    found = []
    if hardware.tflops is not None:
        found.append(f"hardware.tflops={hardware.tflops:g}: taken as the peak in every precision")
    card = described(hardware)
    if card is None or hardware.name != "auto":
        return found
    if hardware.mem_gbps is None:
        found.append(
            f"hardware.mem_gbps: not given; {card.gb_per_s:g} GB/s assumed, a byte for {BALANCE:g} FLOPs, as cards have"
        )
    if hardware.host_gbps is None:
        found.append(f"hardware.host_gbps: not given; PCIe 4 assumed, {PCIE_4:g} GB/s")
    if hardware.gbps is None and hardware.devices > 1:
        found.append(f"hardware.gbps: not given; PCIe 4 assumed between cards, {PCIE_4:g} GB/s")
    return found


def _changed(device: Device, hardware: schema.Hardware) -> Device:
    changes: dict[str, Any] = {}
    if hardware.mem_gib is not None:
        changes["mem_gib"] = hardware.mem_gib
    if hardware.tflops is not None:
        changes["tflops"] = dict.fromkeys(device.tflops, hardware.tflops)
    if not hardware.nvlink:
        changes["nvlink_ranks"] = 1
    if hardware.gbps is not None:
        changes |= {"nvlink_gbps": hardware.gbps, "nvlink_ranks": EVERY}
    if hardware.mem_gbps is not None:
        changes["gb_per_s"] = hardware.mem_gbps
    if hardware.host_gbps is not None:
        changes["pcie_gbps"] = hardware.host_gbps
    return dataclasses.replace(device, **changes)
