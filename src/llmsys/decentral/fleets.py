"""Fleets drawn by a seed, of the kinds that decentralized training is thought for.

    datacentre   equal machines of one make, 10 to 100 Gbit/s
    cloud        several makes in three to five regions: 10 Gbit/s within one, 0.3 to 5 between two, and 10 to 150 ms
    homes        GeForce cards behind lines of 20 Mbit/s up and 100 down and their like, in two to four countries

Cards are those of `llmsys.cost.hardware`, with its peaks, memory and prices.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence

import numpy as np

from llmsys.cost.hardware import DEVICES
from llmsys.decentral.fleet import Between, Fleet, Provider

WATTS = {
    "rtx2080ti": 250, "rtx3080": 320, "rtx3090": 350, "rtx4090": 450, "a100": 400, "a100_pcie": 300,
    "a100_pcie_40gb": 250, "a100_sxm_40gb": 400, "a800": 400, "h100_pcie": 350, "h100": 700, "h200": 700,
}  # fmt: skip
"""Board power by NVIDIA's product pages, in W."""
RESERVED_GIB = 0.7
"""Of a card's memory: CUDA's context and torch's kernels."""


def provider(
    card: str, name: str, up_mbit: float, down_mbit: float, precision: str = "bf16", **more: object
) -> Provider:
    """One machine with a card of the hardware table. ValueError for another card."""
    if card not in DEVICES:
        raise ValueError(f"provider {name}: card={card}: must be one of {', '.join(DEVICES)}")
    device = DEVICES[card]
    given = {
        "tflops": device.peak(precision) / 1e12,
        "mem_gib": device.mem_gib - RESERVED_GIB,
        "host_gbps": device.pcie_gbps,
        "usd_per_hour": device.usd_per_hour,
        "watts": float(WATTS[card]) if card in WATTS else None,
        **more,
    }
    return Provider(name=name, up_mbit=up_mbit, down_mbit=down_mbit, **given)  # type: ignore[arg-type]


def datacentre(count: int, seed: int) -> Fleet:
    random = np.random.default_rng(seed)
    card = str(random.choice(["a100", "a100_pcie_40gb", "h100", "rtx3090"]))
    rate = float(random.choice([10e3, 25e3, 100e3]))
    return Fleet(
        providers=tuple(
            provider(card, f"node{at}", rate, rate, host_gib=256.0, efficiency=float(random.uniform(0.47, 0.53)))
            for at in range(count)
        ),
        other=Between(delay_ms=0.1),
    )


def cloud(count: int, seed: int) -> Fleet:
    random = np.random.default_rng(seed)
    regions = [f"region{at}" for at in range(int(random.integers(3, 6)))]
    cards = ["a100", "a100_pcie_40gb", "rtx4090", "rtx3090", "rtx2080ti"]
    return Fleet(
        providers=tuple(
            provider(
                str(random.choice(cards)), f"vm{at}", 10e3, 10e3,
                precision="fp16", region=str(random.choice(regions)), host_gib=64.0,
                efficiency=float(random.uniform(0.3, 0.6)),
            )
            for at in range(count)
        ),
        between=_between(random, regions, (300, 5000), (10, 150), Between(delay_ms=0.5)),
    )  # fmt: skip


def homes(count: int, seed: int) -> Fleet:
    random = np.random.default_rng(seed)
    countries = [f"country{at}" for at in range(int(random.integers(2, 5)))]
    cards, shares = ["rtx3080", "rtx3090", "rtx4090", "rtx2080ti"], [0.4, 0.25, 0.2, 0.15]
    lines, common = [(20, 100), (20, 200), (40, 250), (10, 50), (100, 100)], [0.5, 0.2, 0.15, 0.1, 0.05]

    def home(at: int) -> Provider:
        up, down = lines[int(random.choice(len(lines), p=common))]
        return provider(
            str(random.choice(cards, p=shares)), f"home{at}", up, down,
            precision="fp16", region=str(random.choice(countries)), host_gib=float(random.choice([16, 32, 64])),
            efficiency=float(random.uniform(0.3, 0.6)), trusted=False,
        )  # fmt: skip

    return Fleet(
        providers=tuple(home(at) for at in range(count)),
        between=_between(random, countries, (50, 500), (20, 120), Between(delay_ms=15.0)),
    )


FLEETS: dict[str, Callable[[int, int], Fleet]] = {"datacentre": datacentre, "cloud": cloud, "homes": homes}
"""Kind -> (providers, seed) -> fleet."""


def _between(
    random: np.random.Generator,
    regions: Sequence[str],
    mbit: tuple[float, float],
    delay_ms: tuple[float, float],
    within: Between,
) -> dict[tuple[str, str], Between]:
    """`within` each, and between two of them a rate and a delay from these ranges, rates by their logarithm."""
    found = {(name, name): within for name in regions}
    for a, b in itertools.combinations(regions, 2):
        rate = float(np.exp(random.uniform(*np.log(mbit))))
        found[a, b] = Between(delay_ms=float(random.uniform(*delay_ms)), mbit=rate)
    return found
