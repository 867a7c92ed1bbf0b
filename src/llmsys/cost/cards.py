"""Which row of `hardware.DEVICES` a GPU is that calls itself by a name: as torch and the driver report it.

A name is known whole or not at all. One that only begins alike is another card: `RTX 3090 Ti` and `RTX 4090 Laptop GPU`
have other peaks, a slice of a card (`MIG 1g.10gb`) has a share of one. Nor is a card one of another size that has its
name: an RTX 3080 of 12 GB has more cores than one of 10 GB.
"""

from __future__ import annotations

import re

from llmsys.cost.hardware import DEVICES

REPORTED = {
    "rtx2080ti": r"GeForce RTX 2080 Ti",
    "rtx3080": r"GeForce RTX 3080",
    "rtx3090": r"GeForce RTX 3090",
    "rtx4090": r"GeForce RTX 4090",
    "a100_pcie_40gb": r"A100-PCIE-40GB",
    "a100_sxm_40gb": r"A100-SXM4?-40GB",
    "a100_pcie": r"A100(-PCIE-80GB| 80GB PCIe)",
    "a100": r"A100-SXM4?-80GB",
    "a800": r"A800-SXM4?-80GB",
    "h100_pcie": r"H100 PCIe",
    "h100": r"H100( 80GB HBM3|-SXM5-80GB)",
    "h200": r"H200",
}
"""Row -> what `torch.cuda.get_device_name` says of it, with or without `NVIDIA` before it."""
CLOSE = 0.05
"""How far, as a share, the memory that a card reports may be from its row's: by driver, ECC and generation of torch."""


def card(reported: str, mem_gib: float) -> str | None:
    """The row of the card of this name and memory; None where there is none, which is then to be measured."""
    for name, pattern in REPORTED.items():
        if re.fullmatch(rf"(NVIDIA )?{pattern}", reported.strip()):
            there = DEVICES[name].mem_gib
            return name if abs(mem_gib - there) <= CLOSE * there else None
    return None
