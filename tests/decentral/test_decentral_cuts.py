"""Costs are what their definition says, operator by operator; cuts of an order are the best there are."""

from __future__ import annotations

import itertools
import math
from collections.abc import Mapping
from typing import Any

import numpy as np
import pytest
from decentral_planning import MB, all_cuts, brute, by_definition, costs

from llmsys.decentral.cuts import Reach
from llmsys.decentral.fleet import GIB
from llmsys.decentral.order import Search
from llmsys.decentral.walk import Walk

WORKS: dict[str, dict[str, Any]] = {
    "1f1b": {},
    "gpipe": {"schedule": "gpipe", "micro_batches": 3},
    "inference": {"train": False},
    "recompute": {"recompute": True},
    "offload": {"offload": True},
    "private": {"private": (1, 1)},
    "regions": {"regions": ("a",)},
    "least rate": {"min_mbit": 120.0},
}


@pytest.mark.parametrize("work", WORKS.values(), ids=WORKS)
def test_costs_are_sums_over_operators(work: Mapping[str, Any]) -> None:
    random = np.random.default_rng(0)
    seen = 0
    for seed in range(30):
        own = costs(seed, 4, 9, roomy=6.0, **{**work, "regions": (), "min_mbit": 0.0})
        count = int(random.integers(1, 5))
        order = [int(p) for p in random.permutation(4)[:count]]
        cuts = (0, *sorted(int(p) for p in random.permutation(np.arange(1, 9))[: count - 1]), 9)
        slowest, total = by_definition(own, order, cuts)
        assert own.slowest_s(order, cuts) == pytest.approx(slowest, rel=1e-12)
        assert own.latency_s(order, cuts) == pytest.approx(total, rel=1e-12)
        seen += math.isfinite(slowest)
    assert seen > 5, "of most random pipelines something fits"


@pytest.mark.parametrize("work", WORKS.values(), ids=WORKS)
@pytest.mark.parametrize("objective", ["throughput", "latency"])
def test_the_cuts_of_an_order_are_the_best(work: Mapping[str, Any], objective: str) -> None:
    found = 0
    for seed in range(12):
        own = costs(seed, 4, 9, roomy=4.0, **work)
        for order in ([0, 1, 2, 3], [3, 1], [2]):
            best = min(
                (by_definition(own, order, cuts)[objective == "latency"] for cuts in all_cuts(9, len(order))),
            )
            slow = any(own.beta(p, q) == math.inf for p, q in itertools.permutations(order, 2))
            if slow:
                continue  # `by_definition` does not know of lines that are left alone
            got = getattr(Reach(own), objective)(order)
            assert (math.inf if got is None else got.seconds) == pytest.approx(best, rel=1e-10)
            found += got is not None
    assert found > 5, "of most orders something fits"


@pytest.mark.parametrize(
    "work", [WORKS["1f1b"], WORKS["inference"], WORKS["offload"]], ids=["1f1b", "inference", "offload"]
)
@pytest.mark.parametrize("objective", ["throughput", "latency"])
def test_up_to_four_providers_the_pipeline_is_the_best_of_all(work: Mapping[str, Any], objective: str) -> None:
    for seed in range(8):
        own = costs(seed, 2 + seed % 3, 7, roomy=3.0, **work)
        got = Search(own, objective).best(own.usable)
        assert (math.inf if got is None else got.seconds) == pytest.approx(brute(own, objective), rel=1e-10)


@pytest.mark.parametrize("seed", [1, 2])
def test_of_six_providers_too(seed: int) -> None:
    own = costs(seed, 6, 7, roomy=3.0)
    got = Search(own).best(own.usable)
    assert got is not None
    assert got.seconds == pytest.approx(brute(own, "throughput"), rel=1e-10)


@pytest.mark.parametrize("seed", range(6))
def test_an_order_of_up_to_twelve_agrees_with_a_linear_program(seed: int) -> None:
    providers = 2 + 2 * seed
    own = costs(2 * seed, providers, 26, roomy=5.0)
    order = list(range(providers))
    got = Reach(own).throughput(order)
    found = milp(own, order)
    assert got is not None
    assert found is not None
    assert got.seconds == pytest.approx(own.slowest_s(order, found), rel=1e-9)


def milp(own: Any, order: list[int]) -> tuple[int, ...] | None:
    """Where each stage begins as one of L binaries; times in ms, bytes in MB, so that the solver's tolerances are
    small. Its own times are rounded by these, so that the cuts are what counts."""
    from scipy.optimize import Bounds, LinearConstraint, milp

    chain, stages, places = own.chain, len(order), own.chain.count + 1
    count = (stages + 1) * places + 1  # z[k, i]: stage k begins at i; stage `stages` is the end; the slowest time
    rows, low, high = [], [], []

    def add(terms: Mapping[tuple[int, int] | str, float], least: float, most: float) -> None:
        row = np.zeros(count)
        for key, value in terms.items():
            row[-1 if key == "time" else key[0] * places + key[1]] += value
        rows.append(row)
        low.append(least)
        high.append(most)

    for k in range(stages + 1):
        add({(k, i): 1 for i in range(places)}, 1, 1)
    add({(0, 0): 1}, 1, 1)
    add({(stages, places - 1): 1}, 1, 1)
    flops = np.r_[0, np.cumsum(chain.work)] * own.work.passes
    for k, p in enumerate(order):
        provider = own.fleet.providers[p]
        ends = {(k + 1, i): float(i) for i in range(places)}
        add({**ends, **{(k, i): -float(i) for i in range(places)}}, 1, np.inf)
        ms = flops / provider.flops * 1e3
        add(
            {**{(k + 1, i): ms[i] for i in range(places)}, **{(k, i): -ms[i] for i in range(places)}, "time": -1},
            -np.inf,
            0,
        )
        memory = own.memory(own.work.in_flight(stages - 1 - k), False) / MB
        received = chain.ahead / MB * own.work.in_flight(stages - 1 - k)
        begins = {(k, i): received[i] - memory[i] for i in range(places)}
        add({**{(k + 1, i): memory[i] for i in range(places)}, **begins}, -np.inf, provider.mem_gib * GIB / MB)
        before = order[k - 1] if k else None
        after = order[k + 1] if k + 1 < stages else None
        for out in (True, False):
            beta_after = (own.beta(p, after) if out else own.beta(after, p)) * 1e3
            beta_before = (own.beta(p, before) if out else own.beta(before, p)) * 1e3
            at_end, at_begin = (chain.ahead, chain.back) if out else (chain.back, chain.ahead)
            terms = {(k + 1, i): at_end[i] * beta_after for i in range(places)}
            add({**terms, **{(k, i): at_begin[i] * beta_before for i in range(places)}, "time": -1}, -np.inf, 0)
    found = milp(
        np.r_[np.zeros(count - 1), 1],
        constraints=LinearConstraint(np.array(rows), low, high),
        integrality=np.r_[np.ones(count - 1), 0],
        bounds=Bounds(np.zeros(count), np.r_[np.ones(count - 1), np.inf]),
        options={"mip_rel_gap": 0, "time_limit": 60},
    )
    if found.x is None:
        return None
    starts = found.x[:-1].reshape(stages + 1, places).argmax(axis=1)
    return tuple(int(each) for each in starts)


def test_a_walk_fits_and_is_never_better_than_the_best() -> None:
    near = []
    for seed in range(40):
        own = costs(seed, 5, 20, roomy=3.0)
        got = Walk(own).best(range(5))
        if got is None:
            continue
        order, cuts, seconds = got
        assert by_definition(own, order, cuts)[0] == pytest.approx(seconds, rel=1e-12)
        exact = Reach(own).throughput(order)
        assert exact is not None
        assert exact.seconds <= seconds * (1 + 1e-9)
        near.append(seconds / exact.seconds)
    assert len(near) > 20
    assert np.median(near) < 1.1, "a walk is what large fleets are planned by"
