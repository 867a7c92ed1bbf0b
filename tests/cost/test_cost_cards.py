"""A GPU's own name finds its row or none: never another card's peak."""

from __future__ import annotations

import pytest

from llmsys.cost.cards import REPORTED, card
from llmsys.cost.hardware import DEVICES


@pytest.mark.parametrize(
    ("reported", "mem_gib", "row"),
    [
        ("NVIDIA A800-SXM4-80GB", 79.3, "a800"),
        ("NVIDIA A100-SXM4-80GB", 79.3, "a100"),
        ("NVIDIA A100-SXM4-40GB", 39.4, "a100_sxm_40gb"),
        ("A100-SXM4-40GB", 39.6, "a100_sxm_40gb"),
        ("NVIDIA A100 80GB PCIe", 79.3, "a100_pcie"),
        ("NVIDIA A100-PCIE-40GB", 39.4, "a100_pcie_40gb"),
        ("NVIDIA H100 80GB HBM3", 79.1, "h100"),
        ("NVIDIA H100 PCIe", 79.2, "h100_pcie"),
        ("NVIDIA H200", 139.8, "h200"),
        ("NVIDIA GeForce RTX 3080", 9.8, "rtx3080"),
        ("NVIDIA GeForce RTX 3090", 23.7, "rtx3090"),
        ("NVIDIA GeForce RTX 4090", 23.6, "rtx4090"),
        ("GeForce RTX 2080 Ti", 10.8, "rtx2080ti"),
        ("NVIDIA GeForce RTX 3080", 11.8, None),  # of 12 GB, with more cores
        ("NVIDIA GeForce RTX 3090 Ti", 23.7, None),
        ("NVIDIA GeForce RTX 4090 D", 23.6, None),
        ("NVIDIA GeForce RTX 4090 Laptop GPU", 15.7, None),
        ("NVIDIA H100 80GB HBM3 MIG 1g.10gb", 9.5, None),
        ("NVIDIA H100 NVL", 93.1, None),
        ("NVIDIA GH200 480GB", 94.5, None),
        ("NVIDIA A800 80GB PCIe", 79.3, None),
        ("NVIDIA L4", 22.0, None),
    ],
)
def test_a_name_is_a_row_whole_or_not_at_all(reported: str, mem_gib: float, row: str | None) -> None:
    assert card(reported, mem_gib) == row


def test_every_listed_card_has_a_name() -> None:
    assert REPORTED.keys() == DEVICES.keys()
