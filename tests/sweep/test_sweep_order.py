"""Claims about order, search and drift: pure functions, held against what they promise on many small cases."""

from __future__ import annotations

import itertools
import random

import pytest

from llmsys.drift import drift
from llmsys.sweep import order, predict
from llmsys.sweep.prune import Point
from llmsys.sweep.search import Bracket, next_probe


def grid(rng: random.Random) -> list[Point]:
    """Up to 24 cells on two axes, some of another kind."""
    cells = rng.sample(list(itertools.product(range(5), range(5), "ab")), rng.randint(2, 24))
    return [Point((("x", float(x)), ("y", float(y))), rest) for x, y, rest in cells]


def runs(points: list[Point], places: list[int], fits: list[bool]) -> int:
    """How many cells run in this order, when what covers a cell that did not fit is left out."""
    witnesses: list[Point] = []
    made = 0
    for place in places:
        if any(points[place].covers(witness) for witness in witnesses):
            continue
        made += 1
        if not fits[place]:
            witnesses.append(points[place])
    return made


def test_ascending_makes_the_fewest_runs_that_any_order_can() -> None:
    """All that fit and all that do not and cover none that does not: these have no witness in any order. Even where the
    prediction is noise."""
    rng = random.Random(0)
    for _ in range(200):
        points = grid(rng)
        limit = {"a": rng.uniform(0, 10), "b": rng.uniform(0, 10)}
        fits = [sum(value for _, value in p.axes) < limit[p.rest] for p in points]
        costs = [rng.choice([None, rng.random()]) for _ in points]
        least = sum(
            ok or not any(p.covers(q) and q != p and not f for q, f in zip(points, fits, strict=True))
            for p, ok in zip(points, fits, strict=True)
        )
        places = order.ascending(costs, points)
        assert sorted(places) == list(range(len(points)))
        assert runs(points, places, fits) == least
        assert runs(points, rng.sample(places, len(places)), fits) >= least


def test_least_predicted_memory_comes_first_and_the_unpredicted_last() -> None:
    points = [Point((), "a"), Point((), "b"), Point((), "c")]
    assert order.ascending([3.0, None, 1.0], points) == [2, 0, 1]
    assert order.ascending([1.0, 1.0, 1.0], [None, None, None]) == [0, 1, 2], "of equals as listed"


def test_rounds_never_repeat_a_cell_before_all_others_had_their_turn() -> None:
    made = order.rounds(3, lambda repeat: order.shuffled(5, seed=1, repeat=repeat))
    assert sorted(made) == [(cell, repeat) for cell in range(5) for repeat in range(3)]
    assert [repeat for _, repeat in made] == [0] * 5 + [1] * 5 + [2] * 5
    assert made[:5] != [(cell, 0) for cell, _ in made[5:10]], "each round in another order"
    assert made == order.rounds(3, lambda repeat: order.shuffled(5, seed=1, repeat=repeat)), "the same every time"


def search(limit: int, threshold: int, start: int, within: float = 0.0) -> tuple[Bracket, int]:
    """(what a search ends with, its probes) where everything up to `threshold` runs."""
    outcomes: dict[int, bool] = {}
    while (value := next_probe(Bracket.of(outcomes), start, limit, within)) is not None:
        assert 1 <= value <= limit
        assert value not in outcomes
        outcomes[value] = value <= threshold
    return Bracket.of(outcomes), len(outcomes)


def test_a_search_finds_the_limit_from_any_guess() -> None:
    for limit, threshold, start in itertools.product([1, 2, 7, 100], range(0, 103, 3), [1, 2, 5, 40, 100, 1000]):
        bracket, _ = search(limit, threshold, start)
        largest = min(threshold, limit)
        assert bracket == Bracket(largest, None if largest == limit else largest + 1)


def test_a_good_guess_is_worth_more_than_half_of_the_probes() -> None:
    far = [search(4096, threshold, start=1)[1] for threshold in range(200, 400)]
    near = [search(4096, threshold, start=int(threshold * 1.04))[1] for threshold in range(200, 400)]
    assert max(near) <= 7
    assert sum(near) < sum(far) / 2


def test_a_tolerance_ends_a_search_early_and_is_kept() -> None:
    bracket, probes = search(4096, 333, start=1, within=0.1)
    assert bracket.failed is not None
    assert bracket.ran <= 333 < bracket.failed <= 1.1 * bracket.ran + 1
    assert probes < search(4096, 333, start=1)[1]


def test_what_ran_above_a_failure_does_not_count() -> None:
    """A run that fits by luck must not hide that a smaller one did not."""
    assert Bracket.of({4: True, 8: False, 16: True}) == Bracket(4, 8)


@pytest.mark.parametrize(("room", "limit", "expected"), [(100, 4096, 33), (2, 4096, 1), (10**6, 64, 64), (3, 1, 1)])
def test_a_search_begins_at_what_is_predicted_to_fit(room: int, limit: int, expected: int) -> None:
    assert predict.largest(lambda value: 3 * value, room, limit) == expected
    assert predict.largest(lambda value: None, room, limit) == 1


def test_a_machine_that_slows_down_is_seen_and_one_outlier_is_no_drift() -> None:
    """60 s a step of the reference; 1 % slower every 100 s for 1000 s is 10 % over the sweep."""
    slower = [(t, 100 * (1 + t / 1e4)) for t in range(0, 1001, 100)]
    found = drift(slower, {}, 0.05)
    assert found is not None
    assert found.percent == pytest.approx(100 * 10 / 105)
    assert found.median_ms == 105
    spike = [(t, 150.0 if t == 500 else 100.0) for t in range(0, 1001, 100)]
    found = drift(spike, {"before": 350, "just before": 450, "just after": 550, "after": 650}, 0.05)
    assert found is not None
    assert found.percent == 0
    assert found.off == {"just before": 50, "just after": 50}, "cells beside the outlier were measured while it was off"
    assert drift(spike[:1], {}, 0.05) is None, "of one measurement nobody can tell"
