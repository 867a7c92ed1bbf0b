"""Many providers: how they are dealt out, how gradients are added up over regions, and what no plan can beat."""

from __future__ import annotations

import itertools
import math

import numpy as np
import pytest
from decentral_planning import MB, costs

from llmsys.decentral import bound, fleets, regions
from llmsys.decentral.chain import Chain
from llmsys.decentral.cost import Costs, Workload
from llmsys.decentral.deal import ALIKE, Deal
from llmsys.decentral.fleet import GIB, Between, Fleet, Provider
from llmsys.decentral.order import Pipeline
from llmsys.decentral.plan import Planner
from llmsys.decentral.score import sync_s
from llmsys.decentral.walk import Walk


def even(count: int, crossing: float = MB) -> Chain:
    ends = np.r_[0, np.full(count - 1, crossing), 0]
    return Chain(
        names=tuple(f"op{at}" for at in range(count)),
        work=np.full(count, 1e10),
        weights=np.full(count, 10 * MB),
        saved=np.full(count, MB),
        ahead=ends,
        back=ends,
    )


def members(count: int, **more: object) -> tuple[Provider, ...]:
    given = {"tflops": 1.0, "mem_gib": 1.0, "up_mbit": 1000.0, "down_mbit": 1000.0, **more}
    return tuple(Provider(name=f"{given.get('region', '')}{at}", **given) for at in range(count))  # type: ignore[arg-type]


# --- the lower bound ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("train", "schedule"),
    [(True, "1f1b"), *(pytest.param(*each, marks=pytest.mark.slow) for each in ((True, "gpipe"), (False, "1f1b")))],
)
def test_no_plan_is_better_than_the_bound(train: bool, schedule: str) -> None:
    """Four providers, of which every plan is looked at, with unlike operators, thin lines, tied and saved tensors."""
    compared = 0
    for seed, roomy, offload in itertools.product(range(4), (1.2, 3.0, 8.0), (False, True)):
        own = costs(seed, 4, 7, roomy=roomy, train=train, schedule=schedule, offload=offload, micro_batches=6)
        found, least = Planner(own).best(), bound.step_s(own)
        if found is not None:
            assert least <= found.score.step_s * (1 + 1e-9), seed
            compared += 1
    assert compared > 10


def test_the_bound_says_what_machines_and_lines_alone_say() -> None:
    """Four that hold all: their FLOPs. Four that hold a quarter each, behind thin lines: a pipeline's lines."""
    work = Workload(train=False, micro_batches=1000)
    whole = Costs(even(40), Fleet(providers=members(4)), work)
    assert bound.step_s(whole) == pytest.approx(1000 * 40e10 / (4 * 0.5e12))
    quarter = 0.27 * 40 * 10 * MB / GIB
    thin = Costs(even(40), Fleet(providers=members(4, mem_gib=quarter, up_mbit=1.0, down_mbit=1.0)), work)
    # what goes ahead passes each line once in and once out: 8 s a micro-batch
    assert bound.step_s(thin) == pytest.approx(8000, rel=0.15)
    found = Planner(thin).best()
    assert found is not None
    assert found.score.step_s == pytest.approx(8000, rel=0.01)


def test_too_little_memory_has_no_bound_but_infinity() -> None:
    small = Costs(even(40), Fleet(providers=members(4, mem_gib=0.01)), Workload())
    assert bound.step_s(small) == math.inf


# --- dealt out ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", fleets.FLEETS)
def test_two_thousand_providers_are_dealt_out_and_each_is_in_one_place(kind: str) -> None:
    own = Costs(even(600, 0.05 * MB), fleets.FLEETS[kind](2000, 1), Workload(micro_batches=40_000, optimizer=60.0))
    found = Planner(own).best()
    assert found is not None
    used = [p for each in found.pipelines for p in each.order]
    assert sorted([*used, *found.spares]) == list(range(2000))
    assert len(found.pipelines) > 10
    for each in found.pipelines:
        assert each.seconds == pytest.approx(own.slowest_s(each.order, each.cuts))
    assert found.score.step_s >= bound.step_s(own)
    if kind == "datacentre":
        assert found.score.step_s < 1.15 * bound.step_s(own), "equal machines behind equal lines"


def test_groups_of_a_bucket_are_alike() -> None:
    own = Costs(even(60), fleets.cloud(300, 2), Workload(micro_batches=1000))
    deal = Deal(own, Walk(own))
    for alike in ALIKE.values():
        for bucket in deal.buckets(own.usable, alike):
            groups = bucket.groups(4)
            assert sorted(p for group in groups for p in group) == sorted(bucket.members)
            sums = [sum(own.fleet.providers[p].mem_gib for p in group) for group in groups]
            largest = max(own.fleet.providers[p].mem_gib for p in bucket.members)
            assert max(sums) - min(sums) <= 2 * largest


def test_a_pipeline_goes_from_region_to_region_where_lines_between_are_thin() -> None:
    """a and c are joined by b alone; dealt by memory, neighbours would be anywhere."""
    near, thin = Between(mbit=1000.0), Between(mbit=1.0)
    three = [each for region in "abc" for each in members(40, region=region, mem_gib=0.5)]
    between = {("a", "b"): near, ("b", "c"): near, ("a", "c"): thin, **{(r, r): near for r in "abc"}}
    own = Costs(even(100), Fleet(providers=tuple(three), between=between), Workload(micro_batches=500))
    deal = Deal(own, Walk(own))
    (bucket,) = deal.buckets(own.usable, ALIKE["line"])
    for group in bucket.groups(2):
        names = [own.fleet.providers[p].region for p in group]
        assert [name for name, _ in itertools.groupby(names)] in (["a", "b", "c"], ["c", "b", "a"])


def test_thin_lines_leave_room_for_what_the_next_stage_sends() -> None:
    """A line of T = twice the least message takes one twice as long alone; the next stage then could send nothing."""
    count = 10
    crossing = np.full(count + 1, 2 * MB)
    crossing[[0, -1]] = 0
    crossing[1::2] = MB
    chain = Chain(
        names=tuple(f"op{at}" for at in range(count)), work=np.full(count, 1e6), weights=np.full(count, 10 * MB),
        saved=np.zeros(count), ahead=crossing, back=crossing,
    )  # fmt: skip
    thin = members(4, mem_gib=(3.3 * 40 + 8) * MB / GIB, up_mbit=10.0, down_mbit=10.0)
    own = Costs(chain, Fleet(providers=thin), Workload(micro_batches=4))
    found = Walk(own).best(range(4))
    assert found is not None
    # in the middle: ahead and back, 1 MB each at the least, out of one line of 10 Mbit/s
    assert found[2] == pytest.approx(2 * 0.8, rel=1e-6)


# --- regions -----------------------------------------------------------------------------------------------------


def test_a_ring_of_regions_avoids_the_thinnest_line() -> None:
    lines = {("a", "b"): 10.0, ("b", "c"): 1.0, ("c", "d"): 10.0, ("d", "a"): 5.0, ("a", "c"): 8.0, ("b", "d"): 9.0}
    fleet = Fleet(
        providers=tuple(members(1, region=name)[0] for name in "abcd"),
        between={pair: Between(mbit=rate) for pair, rate in lines.items()},
    )
    found = regions.ring(fleet, "dcba")
    pairs = {frozenset(pair) for pair in itertools.pairwise([*found, found[0]])}
    assert frozenset("bc") not in pairs
    assert min(fleet.between_regions(*pair).mbit for pair in pairs) == 8.0
    opened = regions.row(fleet, "dcba")
    assert sorted(opened) == list("abcd")
    assert frozenset((opened[0], opened[-1])) == frozenset("ac"), "opened where the ring carries least"


def test_gradients_are_added_up_within_regions_first() -> None:
    """Four replicas in each of two regions, one provider each, with a line of a tenth of theirs between: within, each
    sends 2 x 3/4 of its gradients; between, 2 x 1/2 of the quarter that it has then."""
    own = Fleet(
        providers=(*members(4, region="a"), *members(4, region="b")),
        between={("a", "b"): Between(mbit=100.0)},
    )
    given = Costs(even(10), own, Workload(micro_batches=8))
    pipelines = [Pipeline((p,), (0, 10), 1.0) for p in range(8)]
    once = 10 * 10 * MB * 8e-6 / 1000
    assert sync_s(given, pipelines[:4]) == pytest.approx(1.5 * once)
    assert sync_s(given, pipelines) == pytest.approx(1.5 * once + 1.0 * (10 * once) / 4)
    one_ring = 2 * 7 / 8 * 10 * once
    assert sync_s(given, pipelines) < one_ring
    assert sync_s(given, [*pipelines[:4], pipelines[4]]) == pytest.approx(min(2 * 4 / 5 * 10, 1.5 + 10) * once)
