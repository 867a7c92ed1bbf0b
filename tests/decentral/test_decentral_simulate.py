"""Under churn the broker keeps its promises, which `Broken` is raised for; and what comes out is what is known where
something is known."""

from __future__ import annotations

import dataclasses
import functools
import itertools
import math

import numpy as np
import pytest
from decentral_planning import chain, fleet

from llmsys.decentral import broker, fleets, promises
from llmsys.decentral.broker import Job, State, apply, decide
from llmsys.decentral.chain import Chain
from llmsys.decentral.churn import Churn, turns
from llmsys.decentral.cost import Workload
from llmsys.decentral.events import Beat, Began, Committed, Held, Joined, Left, Lost, Planned, Prepared
from llmsys.decentral.fleet import Fleet, Provider
from llmsys.decentral.promises import Broken
from llmsys.decentral.simulate import World, simulate

RESTLESS = Churn(mtbf_s=60.0, away_s=30.0, shares=(0.25, 0.35, 0.3, 0.1), hang_s=4.0, slow_s=10.0)
SEEDS = 10
"""Here; a thousand in the slow suite."""


def job(seed: int = 0, **work: object) -> Job:
    own = fleet(seed, 8, 12)
    return Job(chain=chain(seed, 12), work=Workload(**work), between=own.between, other=own.other)  # type: ignore[arg-type]


@functools.lru_cache(SEEDS)
def churned(seed: int, seconds: float = 300.0) -> tuple[World, object]:
    world = World(job(seed % 7), fleet(seed % 7, 8, 12, roomy=4.0), RESTLESS, seconds, seed, begin=6)
    return world, world.run()


def many(seeds: range) -> None:
    committed = hurt = 0
    for seed in seeds:
        world, outcome = churned(seed)
        committed += outcome.committed  # type: ignore[attr-defined]
        hurt += outcome.lost_steps  # type: ignore[attr-defined]
        assert world.state.step == outcome.committed  # type: ignore[attr-defined]
        spent = ("computing_s", "wasted_s", "holding_s", "stuck_s")
        assert sum(getattr(outcome, each) for each in spent) <= 300.0 + 1e-6, "each second is spent once"
    assert committed > 20 * len(seeds), "steps are done between the quits"
    assert hurt > len(seeds) / 4, "and some are lost to them, so that there was something to be kept"


def test_no_promise_is_broken() -> None:
    many(range(SEEDS))


@pytest.mark.slow
@pytest.mark.timeout(1800)
def test_no_promise_is_broken_in_a_thousand_runs() -> None:
    many(range(1000))


@pytest.mark.slow
def test_no_promise_is_broken_by_ten_thousand_providers() -> None:
    count = 600
    ends = np.r_[0, np.full(count - 1, 5e4), 0]
    own = Chain(
        names=tuple(f"op{at}" for at in range(count)), work=np.full(count, 1e12), weights=np.full(count, 4e9),
        saved=np.zeros(count), ahead=ends, back=ends,
    )  # fmt: skip
    cloud = fleets.cloud(10_000, 0)
    job = Job(chain=own, work=Workload(micro_batches=20_000), between=cloud.between, other=cloud.other)
    found = simulate(job, cloud, Churn(mtbf_s=864_000.0), 1800.0, 0)
    assert sum(found.repairs.values()) > 10
    assert found.committed > 0


def test_the_same_seed_is_the_same_run() -> None:
    one, other = (dataclasses.asdict(churned.__wrapped__(3)[1]) for _ in range(2))  # type: ignore[call-overload]
    assert one == other
    assert dataclasses.asdict(churned(4)[1]) != one  # type: ignore[call-overload]


def test_without_churn_goodput_is_the_plan_s_throughput() -> None:
    calm = Churn(mtbf_s=1e12, away_s=1.0)
    found = simulate(job(), fleet(0, 8, 12, roomy=4.0), calm, 1000.0, 0)
    assert found.lost_steps == 0
    assert found.goodput_per_s == pytest.approx(found.ideal_per_s, rel=0.02)


def test_shorter_lives_leave_less() -> None:
    found = []
    for mtbf in (30.0, 300.0, 30_000.0):
        churn = dataclasses.replace(RESTLESS, mtbf_s=mtbf)
        runs = [simulate(job(), fleet(0, 8, 12, roomy=4.0), churn, 300.0, seed) for seed in range(3)]
        found.append(sum(run.goodput_per_s / run.ideal_per_s for run in runs) / 3)
    assert found == sorted(found)
    assert found[-1] > 0.9


def test_a_silence_is_found_within_patience_and_a_beat() -> None:
    found = []
    for seed in range(SEEDS):
        found += churned(seed)[1].found_s  # type: ignore[attr-defined]
    assert len(found) > 25
    assert sorted(found)[len(found) // 2] <= broker.PATIENCE_S + 0.5 + 1e-9


def test_a_world_that_breaks_a_promise_is_caught() -> None:
    """So that `no promise is broken` can fail: a broker that commits without being told, or plans with the gone."""
    world, _ = churned(0, 5.0)
    state = world.state.with_(phase=broker.COMPUTING)
    with pytest.raises(Broken, match="have not prepared it"):
        world.promises.check(Committed(at_s=0, epoch=state.epoch, step=state.step + 1), state.with_(epoch=99), set())
    assert state.plan is not None
    first = state.plan.pipelines[0].order[0]
    with pytest.raises(Broken, match="has gone, and owns a stage"):
        promises.check_plan(state.plan, state.with_(absent=frozenset({first})))
    with pytest.raises(Broken, match="do not hold it"):
        world.promises.check(
            Began(at_s=0, epoch=99, step=state.step + 1), state.with_(epoch=99, absent=frozenset()), set()
        )
    doubled = dataclasses.replace(state.plan, pipelines=state.plan.pipelines * 2)
    with pytest.raises(Broken, match="owns two stages"):
        promises.check_plan(doubled, state)


@pytest.mark.parametrize("seed", [36, 105, 177])
def test_what_the_hung_say_late_is_no_broken_promise(seed: int) -> None:
    """They speak of an epoch that is past when they have held the next one already."""
    churned.__wrapped__(seed)


# --- the broker alone -------------------------------------------------------------------------------------------


def provider(name: str, **more: object) -> Provider:
    given = {"tflops": 0.1, "mem_gib": 1.0, "up_mbit": 500.0, "down_mbit": 500.0, **more}
    return Provider(name=name, **given)  # type: ignore[arg-type]


def settled(state: State, now: float) -> State:
    while said := decide(state, now):
        for event in said:
            state = apply(state, event)
    return state


def ready(names: str = "ab") -> State:
    """All hold, and the first step has begun."""
    state = State(job=job(train=True))
    for name in names:
        state = apply(state, Joined(at_s=0, provider=provider(name)))
    state = settled(state, 0.0)
    state = apply(state, Held(at_s=0, names=state.owners, epoch=state.epoch, step=0))
    return settled(state, 0.0)


def test_a_step_is_committed_when_all_have_prepared_it_and_not_before() -> None:
    state = ready()
    assert (state.phase, state.step) == (broker.COMPUTING, 0)
    *some, last = sorted(state.owners)
    state = settled(apply(state, Prepared(at_s=1, names=frozenset(some), epoch=state.epoch, step=1)), 1.0)
    assert state.step == 0
    state = settled(apply(state, Prepared(at_s=1, names=frozenset({last}), epoch=state.epoch, step=1)), 1.0)
    assert (state.step, state.phase) == (1, broker.HOLDING)


def test_who_speaks_of_another_epoch_or_step_is_not_listened_to() -> None:
    state = ready()
    for epoch, step in ((state.epoch - 1, 1), (state.epoch + 1, 1), (state.epoch, 2), (state.epoch, 0)):
        assert apply(state, Prepared(at_s=1, names=state.owners, epoch=epoch, step=step)) == state
    assert apply(state, Prepared(at_s=1, names=frozenset({"nobody"}), epoch=state.epoch, step=1)) == state


def test_silence_is_a_loss_after_patience() -> None:
    state = ready()
    assert decide(state, broker.PATIENCE_S - 0.01) == ()
    said = decide(state, broker.PATIENCE_S + 0.01)
    assert {event.name for event in said if isinstance(event, Lost)} == set("ab")
    state = apply(state, Beat(at_s=1.4, names=frozenset("ab")))
    assert decide(state, broker.PATIENCE_S + 0.01) == ()


def test_a_quit_before_the_commit_begins_the_step_anew_in_a_new_epoch() -> None:
    state = ready("ab")
    (gone, *_) = sorted(state.owners)
    epoch = state.epoch
    state = settled(apply(state, Left(at_s=1, name=gone)), 1.0)
    assert (state.epoch, state.step, state.phase) == (epoch + 1, 0, broker.HOLDING)
    assert gone not in state.owners
    state = settled(apply(state, Held(at_s=2, names=state.owners, epoch=epoch + 1, step=0)), 1.2)
    assert state.phase == broker.COMPUTING


def test_with_nobody_left_it_waits_and_goes_on_when_somebody_comes() -> None:
    state = ready("a")
    state = settled(apply(state, Left(at_s=1, name="a")), 1.0)
    assert state.owners == frozenset()
    state = settled(apply(state, Joined(at_s=2, provider=provider("a"))), 2.0)
    assert state.owners == {"a"}
    assert len(state.providers) == 1, "who comes back has its place again"


def test_too_little_memory_is_waited_out() -> None:
    state = settled(apply(State(job=job()), Joined(at_s=0, provider=provider("tiny", mem_gib=1e-4))), 0.0)
    assert state.plan is None
    assert decide(state, 0.1) == (), "it is not planned again until something changes"
    state = settled(apply(state, Joined(at_s=0.2, provider=provider("large"))), 0.2)
    assert "large" in state.owners


def test_one_that_joins_is_asked_between_steps() -> None:
    state = ready("a")
    state = settled(apply(state, Joined(at_s=0.5, provider=provider("b"))), 0.5)
    assert state.phase == broker.COMPUTING, "a step under way is not disturbed"
    state = settled(apply(state, Prepared(at_s=1, names=frozenset("a"), epoch=state.epoch, step=1)), 1.0)
    epoch = state.epoch
    said = decide(apply(state, Held(at_s=1, names=frozenset("a"), epoch=epoch, step=1)), 1.0)
    assert isinstance(said[0], Planned)


def test_churn_is_what_it_says() -> None:
    own = Churn(mtbf_s=100.0, away_s=10.0, shares=(0.5, 0.3, 0.1, 0.1), hang_s=5, slow_s=5)
    seen = list(itertools.islice(turns(50, own, 1), 20_000))
    assert all(a.at_s <= b.at_s for a, b in itertools.pairwise(seen))
    ends = [turn.what for turn in seen if turn.what in ("leaves", "dies", "hangs", "slows")]
    shares = [ends.count(what) / len(ends) for what in ("leaves", "dies", "hangs", "slows")]
    assert shares == pytest.approx([0.5, 0.3, 0.1, 0.1], abs=0.02)
    span = seen[-1].at_s * 50
    up = span - sum(10.0 for turn in seen if turn.what == "joins") - 5.0 * (ends.count("hangs") + ends.count("slows"))
    assert up / len(ends) == pytest.approx(100.0, rel=0.05)
    assert math.isfinite(span)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"mtbf_s": 0.0}, "mtbf_s=0.0"),
        ({"shares": (1.0, 1.0, 0.0, 0.0)}, "shares="),
        ({"slowdown": 0.5}, "slowdown=0.5"),
    ],
)
def test_churn_that_cannot_be_is_refused(change: dict[str, object], words: str) -> None:
    with pytest.raises(ValueError, match=words):
        Churn(**change)  # type: ignore[arg-type]


def test_fleets_of_one_name_twice_are_refused_before_anything_runs() -> None:
    with pytest.raises(ValueError, match="provider a: is there twice"):
        Fleet(providers=(provider("a"), provider("a")))


def test_an_owner_that_goes_and_comes_back_before_anybody_looked_is_planned_for_anew() -> None:
    """It holds nothing any more: nothing goes on as if it did, and nobody is forgotten."""
    alone = settled(apply(State(job=job(train=True)), Joined(at_s=0, provider=provider("a"))), 0.0)
    assert alone.owners == {"a"}
    back = apply(apply(alone, Left(at_s=1, name="a")), Joined(at_s=1, provider=provider("a")))
    back = settled(back, 1.0)
    assert back.owners == {"a"}
    assert back.epoch > alone.epoch
    assert back.said == frozenset()


def test_an_owner_that_joins_again_has_begun_anew() -> None:
    """Its process has died and another one speaks in its name, before its silence was noticed."""
    state = State(job=job(train=True))
    for name in ("a", "b"):
        state = apply(state, Joined(at_s=0, provider=provider(name)))
    state = settled(state, 0.0)
    state = settled(apply(state, Held(at_s=0, names=state.owners, epoch=state.epoch, step=0)), 0.1)
    assert state.phase == broker.COMPUTING
    (owner, *_) = sorted(state.owners)
    again = settled(apply(state, Joined(at_s=0.5, provider=provider(owner))), 0.5)
    assert again.epoch > state.epoch
    assert again.phase == broker.HOLDING
    assert again.present == {"a", "b"}


def test_a_beat_that_comes_late_makes_nobody_older() -> None:
    state = apply(State(job=job()), Joined(at_s=5.0, provider=provider("a")))
    assert apply(state, Beat(at_s=3.0, names=frozenset({"a"}))).heard_s["a"] == 5.0
