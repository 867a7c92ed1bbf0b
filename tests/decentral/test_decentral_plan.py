"""Plans: replicas, fleets, what they say when nothing fits, and how they are mended."""

from __future__ import annotations

import dataclasses
import itertools
import math

import numpy as np
import pytest
from decentral_planning import MB, brute, costs

from llmsys.decentral import baselines, fleets
from llmsys.decentral.chain import Chain
from llmsys.decentral.cost import Costs, Workload
from llmsys.decentral.fleet import GIB, Between, Fleet, Provider
from llmsys.decentral.order import Pipeline
from llmsys.decentral.pace import pace
from llmsys.decentral.plan import Plan, Planner, plan
from llmsys.decentral.repair import after_join, after_quit
from llmsys.decentral.score import score


def even(count: int, crossing: float = MB) -> Chain:
    """Equal operators."""
    ends = np.r_[0, np.full(count - 1, crossing), 0]
    return Chain(
        names=tuple(f"op{at}" for at in range(count)),
        work=np.full(count, 1e9),
        weights=np.full(count, MB),
        saved=np.full(count, MB),
        ahead=ends,
        back=ends,
        blocks=tuple(f"layers.{at}" for at in range(count)),
    )


def equal(count: int, mem_gib: float = 1.0, mbit: float = 1000.0, **more: object) -> Fleet:
    return Fleet(
        providers=tuple(
            Provider(name=f"p{at}", tflops=1.0, mem_gib=mem_gib, up_mbit=mbit, down_mbit=mbit, **more)  # type: ignore[arg-type]
            for at in range(count)
        )
    )


def test_up_to_four_providers_no_way_to_part_them_into_replicas_is_better() -> None:
    for seed in range(6):
        own = costs(seed, 3 + seed % 2, 6, roomy=4.0, train=False)
        members = list(own.usable)
        best = 0.0
        alone: dict[tuple[int, ...], float] = {}
        for count in range(1, len(members) + 1):
            for group in itertools.combinations(members, count):
                some = Costs(own.chain, own.fleet, own.work, frozenset(members) - set(group))
                alone[group] = 1 / brute_of(some, group)
        for owners in itertools.product(range(len(members) + 1), repeat=len(members)):
            groups: dict[int, list[int]] = {}
            for p, owner in zip(members, owners, strict=True):
                groups.setdefault(owner, []).append(p)
            rate = sum(alone[tuple(group)] for owner, group in groups.items() if owner)
            best = max(best, rate)
        found = Planner(own).best()
        assert (found.per_s if found else 0.0) == pytest.approx(best, rel=1e-9)


def brute_of(own: Costs, group: tuple[int, ...]) -> float:
    """The best pipeline of these providers alone."""
    few = Fleet(providers=tuple(own.fleet.providers[p] for p in group), between=own.fleet.between)
    return brute(Costs(own.chain, few, own.work), "throughput")


def test_each_provider_is_in_one_place_at_most_and_nobody_is_lost() -> None:
    for kind, count in itertools.product(fleets.FLEETS, (5, 12, 40)):
        own = Costs(even(60), fleets.FLEETS[kind](count, 3), Workload(micro_batches=64))
        found = Planner(own).best()
        assert found is not None
        used = [p for each in found.pipelines for p in each.order]
        assert sorted([*used, *found.spares]) == list(range(count))
        for each in found.pipelines:
            assert each.seconds == pytest.approx(own.slowest_s(each.order, each.cuts))
            assert math.isfinite(each.seconds)
        assert sum(found.score.shares) == 64


def test_a_step_waits_for_the_last_pipeline_and_for_the_sum_of_gradients() -> None:
    own = Costs(even(8), equal(4), Workload(micro_batches=8, schedule="eager_1f1b"))
    pipelines = [Pipeline((0, 1), (0, 4, 8), 0.0), Pipeline((2, 3), (0, 4, 8), 0.0)]
    pipelines = [each._replace(seconds=own.slowest_s(each.order, each.cuts)) for each in pipelines]
    found = score(own, pipelines)
    stage, message = 4 * 3e9 / 0.5e12, MB * 8e-9
    slowest = max(stage, message)  # a line out carries what goes ahead or what goes back: there is one neighbour
    alone = 2 * stage + 2 * message
    assert found.shares == (4, 4)
    # a ring of two: each provider sends all of its gradients once, and so many come back
    assert found.sync_s == pytest.approx(4 * MB * 8e-9)
    assert found.step_s == pytest.approx(alone + 3 * slowest + found.sync_s)
    # in 1F1B the first stage has two on their way, and of these one is there and back every alone / 2
    lazy = score(Costs(own.chain, own.fleet, Workload(micro_batches=8)), pipelines)
    assert lazy.step_s == pytest.approx(alone + 3 * alone / 2 + found.sync_s)


def test_a_faster_replica_has_more_of_the_batch() -> None:
    two = Fleet(
        providers=(
            Provider(name="fast", tflops=3.0, mem_gib=1, up_mbit=1e6, down_mbit=1e6),
            Provider(name="slow", tflops=1.0, mem_gib=1, up_mbit=1e6, down_mbit=1e6),
        )
    )
    found = plan(even(8), two, Workload(micro_batches=40), replicas=2)
    shares = {each.order[0]: share for each, share in zip(found.pipelines, found.score.shares, strict=True)}
    assert shares == {0: 30, 1: 10}


def test_thin_lines_make_replicas_and_not_longer_pipelines() -> None:
    """Over 1 Mbit/s a cut costs 16 s a micro-batch, and a replica's gradients 128 s a step of 1000."""
    found = plan(even(8), equal(4, mbit=1.0), Workload(micro_batches=100_000))
    assert [len(each.order) for each in found.pipelines] == [1, 1, 1, 1]


def test_no_memory_for_replicas_makes_one_pipeline() -> None:
    need = (8 * MB * 4 + 8 * MB * 3) / GIB
    found = plan(even(8), equal(4, mem_gib=need / 3), Workload(micro_batches=8))
    assert [len(each.order) for each in found.pipelines] == [4]


def test_private_operators_stay_with_the_trusted() -> None:
    members = (
        *(Provider(name=f"own{at}", tflops=0.1, mem_gib=1, up_mbit=1e4, down_mbit=1e4) for at in range(2)),
        *(
            Provider(name=f"other{at}", tflops=2, mem_gib=1, up_mbit=1e4, down_mbit=1e4, trusted=False)
            for at in range(2)
        ),
    )
    found = plan(even(12), Fleet(providers=members), Workload(private=(2, 1)), replicas=1)
    (only,) = found.pipelines
    assert {only.order[0], only.order[-1]} == {0, 1}
    assert only.cuts[1] >= 2
    assert only.cuts[-2] <= 11


@pytest.mark.parametrize(
    ("members", "work", "words"),
    [
        ((2, 0.01), {}, ["2 providers cannot hold", "are missing", "more of 0.01 GiB would do"]),
        ((200, 0.002), {}, ["operator op", "alone", "no provider has more than 0.002"]),
        ((2, 1.0), {"regions": ("mars",)}, ["regions=['mars']: no provider is there"]),
    ],
)
def test_what_is_missing_is_said(members: tuple[int, float], work: dict[str, object], words: list[str]) -> None:
    with pytest.raises(ValueError) as error:
        plan(even(8), equal(members[0], mem_gib=members[1]), Workload(**work))  # type: ignore[arg-type]
    assert all(word in str(error.value) for word in words), str(error.value)


def test_what_is_said_to_suffice_does() -> None:
    with pytest.raises(ValueError) as error:
        plan(even(60), equal(2, mem_gib=0.1), Workload(micro_batches=1))
    more = int(str(error.value).split(";")[1].split()[0])
    assert plan(even(60), equal(2 + more, mem_gib=0.1), Workload(micro_batches=1)).pipelines


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"up_mbit": -1.0}, "provider a: up_mbit=-1.0: must be a positive number"),
        ({"down_mbit": None}, "provider a: down_mbit=None: must be a positive number"),
        ({"efficiency": 1.5}, "provider a: efficiency=1.5"),
        ({"mem_gib": math.nan}, "provider a: mem_gib=nan"),
    ],
)
def test_a_provider_that_cannot_be_is_refused_by_name(change: dict[str, object], words: str) -> None:
    given = {"name": "a", "tflops": 1.0, "mem_gib": 1.0, "up_mbit": 1.0, "down_mbit": 1.0, **change}
    with pytest.raises(ValueError, match=words):
        Provider(**given)  # type: ignore[arg-type]


def test_two_providers_of_one_name_are_refused() -> None:
    one = Provider(name="a", tflops=1.0, mem_gib=1.0, up_mbit=1.0, down_mbit=1.0)
    with pytest.raises(ValueError, match="provider a: is there twice"):
        Fleet(providers=(one, one))
    with pytest.raises(ValueError, match="a fleet without providers"):
        Fleet(providers=())
    with pytest.raises(ValueError, match="mbit=-1"):
        Between(mbit=-1)


@pytest.mark.parametrize("kind", fleets.FLEETS)
def test_no_baseline_is_better(kind: str) -> None:
    for seed in range(4):
        own = Costs(even(48, 4 * MB), fleets.FLEETS[kind](8, seed), Workload(micro_batches=64))
        found = Planner(own).best()
        assert found is not None
        for name, make in baselines.PIPELINES.items():
            if (other := make(own)) is not None:
                assert found.per_s >= Planner(own).made([other]).per_s * (1 - 1e-9), name
        for name, spread in baselines.SWARMS.items():
            assert found.per_s >= baselines.routed(own, spread(own)) * (1 - 1e-9), name


def test_a_pipeline_that_takes_everybody_is_found_though_no_first_order_is_one() -> None:
    """Memories that only one order of all four fits; orders by speed, memory and lines are others."""
    found = 0
    for seed in range(300):
        own = costs(seed, 4, 6, roomy=1.15, micro_batches=8)
        if Planner(own).finder.search.first(own.usable) is None and brute(own, "throughput") < math.inf:
            assert Planner(own).best() is not None, seed
            found += 1
    assert found, "there are such fleets among these"


def test_machines_alone_are_weighed_against_pipelines_by_a_step() -> None:
    """The faster one does a step alone in the time of its computing; with the other a line is waited for twice."""
    two = Fleet(
        providers=(
            Provider(name="fast", tflops=1.0, mem_gib=1.0, up_mbit=100.0, down_mbit=100.0),
            Provider(name="slow", tflops=0.2, mem_gib=1.0, up_mbit=100.0, down_mbit=100.0),
        )
    )
    for thorough in (True, False):
        found = Planner(Costs(even(8), two, Workload(micro_batches=2)), thorough=thorough).best()
        assert found is not None
        assert [each.order for each in found.pipelines] == [(0,)]


def test_a_parameter_of_two_stages_goes_there_and_back_once_a_step() -> None:
    tied = dataclasses.replace(even(8), ties=((0, 7, 50 * MB),), weights=np.full(8, 100 * MB))
    own, plain = (Costs(each, equal(2, mem_gib=8.0), Workload(micro_batches=4)) for each in (tied, even(8)))
    cut, line = ((0, 1), (0, 4, 8)), 8e-9
    assert pace(own, *cut).once_s == pytest.approx(2 * 50 * MB * line)
    assert pace(plain, *cut).once_s == 0
    assert pace(own, (0,), (0, 8)).once_s == 0, "one stage has both readers"


def test_gradients_take_no_line_that_the_job_does_not() -> None:
    own = Costs(even(8), equal(2, mbit=50.0), Workload(micro_batches=100_000, min_mbit=100.0))
    found = Planner(own).best()
    assert found is not None
    assert len(found.pipelines) == 1


# --- a provider goes, a provider comes ---------------------------------------------------------------------------


def planned(own: Costs) -> tuple[Planner, Plan]:
    planner = Planner(own)
    found = planner.best()
    assert found is not None
    return planner, found


@pytest.mark.parametrize("seed", range(8))
def test_after_a_quit_the_plan_holds_without_the_one_that_went(seed: int) -> None:
    own = costs(seed, 7, 20, roomy=5.0)
    planner, before = planned(own)
    for gone in (p for each in before.pipelines for p in each.order):
        left, found = after_quit(planner, before, gone)
        used = [p for each in found.plan.pipelines for p in each.order]
        assert gone not in used
        assert sorted([*used, *found.plan.spares]) == sorted(set(range(7)) - {gone})
        for each in found.plan.pipelines:
            assert left.costs.slowest_s(each.order, each.cuts) == pytest.approx(each.seconds)
            assert math.isfinite(each.seconds)


def test_a_spare_of_the_same_kind_takes_one_stage_and_nothing_else_moves() -> None:
    own = Costs(even(12), equal(4, mem_gib=0.05), Workload(micro_batches=16))
    planner = Planner(own)
    before = planner.made([planner.finder.search.cut((0, 1, 2))])  # type: ignore[list-item]
    assert before.spares == (3,)
    _, found = after_quit(planner, before, 1)
    assert found.how == "spare"
    assert found.plan.pipelines[0].order == (0, 3, 2)
    assert found.plan.pipelines[0].cuts == before.pipelines[0].cuts
    begin, end = before.pipelines[0].cuts[1:3]
    assert found.moved_bytes == (end - begin) * MB * 3  # weights, and AdamW's two moments


def test_without_a_spare_neighbours_take_what_is_left() -> None:
    own = Costs(even(12), equal(3), Workload(micro_batches=16))
    planner = Planner(own)
    before = planner.made([planner.finder.search.cut((0, 1, 2))])  # type: ignore[list-item]
    _, found = after_quit(planner, before, 1)
    assert found.how in ("absorb", "recut")
    assert found.moved_bytes == 4 * MB * 3, "only the operators of the one that went are anywhere else"


def test_of_many_replicas_one_may_end() -> None:
    """Each holds the model alone, behind lines that are too thin for more than the sum of gradients."""
    own = Costs(even(8), equal(4, mbit=10.0), Workload(micro_batches=400))
    planner, before = planned(own)
    assert [len(each.order) for each in before.pipelines] == [1, 1, 1, 1]
    _, found = after_quit(planner, before, 2)
    assert found.how == "drop"
    assert found.moved_bytes == 0
    assert len(found.plan.pipelines) == 3


@pytest.mark.slow
def test_many_that_go_one_after_another_do_not_wear_a_plan_down() -> None:
    """Each time a little less is let pass: it is measured by what all together were good for, not by the last time."""
    own = Costs(even(48), equal(24, mem_gib=0.05), Workload(micro_batches=400))
    planner, now = planned(own)
    for gone in range(12):
        planner, found = after_quit(planner, now, gone)
        now = found.plan
        fresh = Planner(planner.costs).best()
        assert fresh is not None
        assert now.per_s > 0.75 * fresh.per_s, gone


def test_a_spare_that_goes_changes_nothing() -> None:
    own = Costs(even(12), equal(4), Workload(micro_batches=16))
    planner = Planner(own)
    before = planner.made([planner.finder.search.cut((0, 1, 2))])  # type: ignore[list-item]
    _, found = after_quit(planner, before, 3)
    assert (found.how, found.moved_bytes, found.plan.spares) == ("none", 0.0, ())
    with pytest.raises(ValueError, match="provider p3: is not in the plan"):
        after_quit(planner, found.plan, 3)


def test_when_the_last_that_can_hold_it_goes_what_is_missing_is_said() -> None:
    own = Costs(even(20), equal(2, mem_gib=0.07), Workload(micro_batches=2))
    planner, before = planned(own)
    assert [len(each.order) for each in before.pipelines] == [2]
    with pytest.raises(ValueError, match="MiB are missing"):
        after_quit(planner, before, before.pipelines[0].order[0])


def test_who_comes_brings_nobody_in_whom_the_job_leaves_out() -> None:
    both = Fleet(providers=tuple(Provider(name=f"{r}{at}", tflops=1.0, mem_gib=0.06, up_mbit=1000, down_mbit=1000,
                 region=r) for r in "ab" for at in range(3)))  # fmt: skip
    own = Costs(even(12), both, Workload(micro_batches=16, regions=("a",)), absent=frozenset({2}))
    before = Planner(own).best()
    assert before is not None
    found = after_join(Planner(dataclasses.replace(own, absent=frozenset())), before, 2)
    assert {p for each in found.plan.pipelines for p in each.order} <= {0, 1, 2}


def test_one_that_comes_is_a_spare_until_it_helps() -> None:
    own = Costs(even(12), equal(2), Workload(micro_batches=16))
    planner = Planner(own)
    before = planner.made([planner.finder.search.cut((0, 1))])  # type: ignore[list-item]
    weak = Provider(name="weak", tflops=0.01, mem_gib=1.0, up_mbit=1000, down_mbit=1000)
    strong = Provider(name="strong", tflops=2.0, mem_gib=1.0, up_mbit=1000, down_mbit=1000)
    for joined, ways in ((weak, ("none",)), (strong, ("insert", "replica"))):
        more = Planner(
            Costs(own.chain, dataclasses.replace(own.fleet, providers=(*own.fleet.providers, joined)), own.work)
        )
        found = after_join(more, before, 2)
        assert found.how in ways, joined.name
        assert found.plan.per_s >= before.per_s
        assert (2 in found.plan.spares) == (found.how == "none")
