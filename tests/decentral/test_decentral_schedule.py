"""A step's events: nothing is done before what it needs, by nobody twice at a time, and the times are the closed
forms' where there are some."""

from __future__ import annotations

import itertools
from collections import defaultdict

import pytest
from decentral_planning import chain

from llmsys.decentral import fleets
from llmsys.decentral.cost import Costs, Workload
from llmsys.decentral.pace import pace
from llmsys.decentral.plan import Planner
from llmsys.decentral.schedule import Span, Timing, ends_s, orders, run


def timing(stages: int, forward: float = 1.0, backward: float = 2.0, line: float = 0.0, alpha: float = 0.0) -> Timing:
    lines = [line] * (stages - 1)
    alphas = [alpha] * (stages - 1)
    return Timing([forward] * stages, [backward] * stages if backward else [], lines, lines, alphas, alphas)


@pytest.mark.parametrize("schedule", ["gpipe", "1f1b", "eager_1f1b"])
@pytest.mark.parametrize(("stages", "count"), [(1, 1), (1, 5), (4, 2), (4, 8), (7, 20)])
def test_without_lines_a_step_takes_what_is_known_of_both_schedules(schedule: str, stages: int, count: int) -> None:
    """(n + S - 1) (f + b): the bubble of GPipe and of 1F1B alike (Narayanan et al., arXiv 2104.04473, 2.2)."""
    assert ends_s(run(timing(stages), schedule, count)) == pytest.approx((count + stages - 1) * 3.0)


def test_inference_fills_the_pipeline_once() -> None:
    assert ends_s(run(timing(5, backward=0.0, line=0.5, alpha=3.0), "1f1b", 10)) == pytest.approx(5 + 4 * 3.5 + 9)


def test_the_slowest_line_sets_the_pace() -> None:
    assert ends_s(run(timing(3, backward=0.0, line=4.0), "1f1b", 50)) == pytest.approx(3 + 2 * 4 + 49 * 4)


def test_eager_1f1b_hides_lines_that_1f1b_waits_for() -> None:
    """Lines that take two thirds as long there and back as a stage computes: with one more micro-batch on its way for
    each of them, stages are never idle; else a round trip is waited for (`decentral.pace`)."""
    own = timing(4, line=1.0)
    alone, count = 4 * 3 + 3 * 2, 60
    assert ends_s(run(own, "eager_1f1b", count)) == pytest.approx(alone + (count - 1) * 3.0, rel=0.02)
    assert ends_s(run(own, "1f1b", count)) == pytest.approx(alone + (count - 1) * alone / 4, rel=0.02)


@pytest.mark.parametrize("schedule", ["1f1b", "eager_1f1b", "gpipe"])
@pytest.mark.parametrize("kind", ["datacentre", "homes"])
def test_a_step_is_priced_as_it_is_played(schedule: str, kind: str) -> None:
    """Unequal machines and lines: of ten pipelines the median within 5 %, all within a fifth. In 1F1B behind thin lines
    stages also wait for each other's turns, and steps take up to half as long again as they are priced at."""
    ratios = []
    for seed in range(10):
        own = Costs(
            chain(seed, 40), fleets.FLEETS[kind](5, seed), Workload(micro_batches=32, schedule=schedule, recompute=True)
        )
        found = Planner(own, thorough=False).finder.cut(range(5))
        assert found is not None
        played = ends_s(run(Timing.of(own, found), schedule, 32))
        ratios.append(played / pace(own, found.order, found.cuts).step_s(32))
    if (schedule, kind) == ("1f1b", "homes"):
        assert 0.95 < min(ratios) <= max(ratios) < 1.5, ratios
    else:
        assert sorted(ratios)[5] == pytest.approx(1.0, rel=0.05), ratios
        assert max(abs(each - 1) for each in ratios) < 0.2, ratios


@pytest.mark.parametrize("schedule", ["gpipe", "1f1b", "eager_1f1b"])
def test_nothing_is_before_what_it_needs(schedule: str) -> None:
    own = Timing([1, 3, 2], [2, 4, 5], [0.7, 2.5], [1.1, 0.4], [0.2, 0.0], [0.0, 0.9])
    spans = run(own, schedule, 6)
    at = {(span.what, span.stage, span.micro_batch): span for span in spans}
    assert len(at) == len(spans) == 6 * (3 * 2 + 2 * 2)
    for m, stage in itertools.product(range(6), range(2)):
        sent, back = at["ahead", stage, m], at["back", stage + 1, m]
        assert at["F", stage, m].end_s <= sent.begin_s
        assert sent.end_s + own.alpha[stage] <= at["F", stage + 1, m].begin_s
        assert at["B", stage + 1, m].end_s <= back.begin_s
        assert back.end_s + own.alpha_back[stage] <= at["B", stage, m].begin_s
    for m, stage in itertools.product(range(6), range(3)):
        assert at["F", stage, m].end_s <= at["B", stage, m].begin_s
    busy: dict[tuple[str, int], list[Span]] = defaultdict(list)
    for span in spans:
        if span.what in "FB":
            busy["computes", span.stage].append(span)
        else:
            busy["sends", span.stage].append(span)
            busy["receives", span.stage + (1 if span.what == "ahead" else -1)].append(span)
    for who, theirs in busy.items():
        ordered = sorted(theirs, key=lambda span: span.begin_s)
        assert all(a.end_s <= b.begin_s + 1e-12 for a, b in itertools.pairwise(ordered)), who


@pytest.mark.parametrize(("stages", "count"), [(4, 9), (6, 3)])
def test_1f1b_keeps_no_more_micro_batches_than_there_are_stages_to_the_end(stages: int, count: int) -> None:
    for stage, todo in enumerate(orders("1f1b", stages, count)):
        kept = most = 0
        for what, _ in todo:
            kept += 1 if what == "F" else -1
            most = max(most, kept)
        assert most == min(count, stages - stage)
        assert sorted(todo) == sorted((what, m) for what in "FB" for m in range(count))
