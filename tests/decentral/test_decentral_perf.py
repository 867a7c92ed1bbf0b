"""Many small cards against a few large ones: on chains of equal stages the planner says what the closed form says."""

from __future__ import annotations

import dataclasses
import math

import numpy as np
import pytest

from llmsys.cost.hardware import DEVICES
from llmsys.decentral import fleets
from llmsys.decentral.chain import Chain
from llmsys.decentral.cost import Workload
from llmsys.decentral.perf import Cards, closed_critical_mbit, compare

FORWARD = Workload(train=False)


def equal_stages(layers: int, width: int, length: int, count: int) -> Chain:
    """A transformer's forward pass in fp16 as `count` equal pieces: 2 L (4 D^2 + 2 4 D^2) + 4 L^2 D FLOPs a layer."""
    work = layers * (2 * length * 12 * width**2 + 4 * length**2 * width)
    crossing = np.r_[0, np.full(count - 1, 2.0 * length * width), 0]
    weights = np.full(count, layers * 12 * width**2 * 2 / count)
    return Chain(
        names=tuple(f"piece{at}" for at in range(count)),
        work=np.full(count, work / count),
        weights=weights,
        saved=np.zeros(count),
        ahead=crossing,
        back=crossing,
    )


MODELS = {"bert_large": (24, 1024, 512, 37e3), "7b": (32, 4096, 2048, 7.0e3), "gpt3": (96, 12288, 2048, 0.82e3)}
"""Layers, width, length, and the critical rate in Mbit/s that was derived by hand."""


@pytest.mark.parametrize("name", MODELS)
def test_critical_rates_are_those_of_the_closed_form(name: str) -> None:
    layers, width, length, expected = MODELS[name]
    own = equal_stages(layers, width, length, 50)
    card = dataclasses.replace(fleets.provider("rtx3080", "rtx3080", 1, 1, precision="fp16"), mem_gib=1e9)
    found = Cards(own, FORWARD, card, 50).critical_mbit()
    closed = closed_critical_mbit(float(own.work.sum()), float(own.ahead[1]), 50, card.flops)
    assert found == pytest.approx(closed, rel=2e-3)
    assert closed == pytest.approx(expected, rel=0.01)


def test_fifty_small_cards_are_four_large_ones_by_their_peaks() -> None:
    card, large = (fleets.provider(name, name, 1, 1, precision="fp16") for name in ("rtx3080", "h100_pcie"))
    own = equal_stages(*MODELS["7b"][:3], 100)
    found = compare(Cards(own, FORWARD, card, 50), Cards(own, FORWARD, large, 4), 1000.0, 10.0)
    assert 1 / found.ratio == pytest.approx(1.016, rel=0.01)
    assert 1 / found.ratio == pytest.approx(
        4 * DEVICES["h100_pcie"].peak("fp16") / (50 * DEVICES["rtx3080"].peak("fp16"))
    )
    assert found.uneven == pytest.approx(1.0)


def test_training_sends_gradients_back_over_the_same_line_and_computes_three_times_as_much() -> None:
    own = equal_stages(32, 4096, 2048, 50)
    card = dataclasses.replace(fleets.provider("rtx3080", "a", 1, 1, precision="fp16"), mem_gib=1e9)
    forward = Cards(own, FORWARD, card, 50).critical_mbit()
    both = Cards(own, Workload(), card, 50).critical_mbit()
    assert both == pytest.approx(forward * 2 / 3, rel=2e-3)


def test_the_critical_rate_goes_with_the_efficiency() -> None:
    own = equal_stages(24, 1024, 512, 50)
    card = dataclasses.replace(fleets.provider("rtx3080", "a", 1, 1, precision="fp16"), mem_gib=1e9)
    cards = Cards(own, FORWARD, card, 50)
    slower = dataclasses.replace(cards, card=dataclasses.replace(card, efficiency=card.efficiency / 2))
    assert slower.critical_mbit() == pytest.approx(cards.critical_mbit() / 2, rel=2e-3)


def test_memory_is_told_apart_from_speed() -> None:
    own = equal_stages(96, 12288, 2048, 100)
    small = fleets.provider("rtx3080", "small", 1, 1, precision="fp16")
    large = fleets.provider("h100", "large", 1, 1, precision="fp16")
    found = compare(Cards(own, FORWARD, small, 50), Cards(own, FORWARD, large, 4), 1000.0, 10.0)
    assert found.small.holds
    assert not found.large.holds, "348 GB of weights and 4 x 80 GB"
    assert found.large.weights_gib > found.large.has_gib
    trained = compare(Cards(own, Workload(), small, 50), Cards(own, Workload(), large, 4), 1000.0, 10.0)
    assert not trained.small.holds


def test_as_fast_as_the_large_cards_is_what_the_rate_says() -> None:
    """Just above it the small cards' slowest stage is no slower than the large ones', just below it is; and no line
    makes up for peaks that are less together."""
    own = equal_stages(*MODELS["7b"][:3], 100)
    card, large = (
        dataclasses.replace(fleets.provider(name, name, 1, 1, precision="fp16"), mem_gib=1e9)
        for name in ("rtx3080", "h100_pcie")
    )
    small = Cards(own, FORWARD, card, 50)
    found = compare(small, Cards(own, FORWARD, large, 3), 1000.0, 10.0)
    assert found.ratio > 1
    for factor, faster in ((1.01, True), (0.99, False)):
        there = small.at(found.parity_mbit * factor).pipeline()
        assert there is not None
        assert (1 / there.seconds >= found.large_per_s * (1 - 1e-6)) is faster
    assert math.isinf(compare(small, Cards(own, FORWARD, large, 8), 1000.0, 10.0).parity_mbit)
