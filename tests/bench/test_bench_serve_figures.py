"""Claims about figures: of outcomes that are known they are what arithmetic by hand says."""

from __future__ import annotations

import asyncio
import json
import math

import pytest
from serve_harness import outcome, task

from llmsys.bench.serve import figures, rate
from llmsys.bench.serve.outcome import Outcome
from llmsys.bench.serve.sse import Events

FIRST = outcome(0, due=0.0, sent=0.001, tokens=(0.101, 0.111, 0.131))
SECOND = outcome(1, due=0.5, sent=0.5, tokens=(0.8, 1.0))
BROKEN = outcome(2, due=0.5, sent=0.5, tokens=(0.6,), status="closed", wanted=9, end_s=2.0)
UNSENT = outcome(3, due=9.0, sent=-1.0, status="cut", end_s=2.0)


def test_latencies_are_of_those_that_ended_well() -> None:
    found = figures.latencies([FIRST, SECOND, BROKEN, UNSENT])
    assert found["ttft_ms"] == pytest.approx([100, 300])
    assert found["tpot_ms"] == pytest.approx([15, 200])
    assert found["itl_ms"] == pytest.approx([10, 20, 200])
    assert found["e2e_ms"] == pytest.approx([130, 500])
    assert found["lag_ms"] == pytest.approx([1, 0, 0])


def test_throughput_counts_what_ended_well_over_all_of_the_time() -> None:
    found = figures.of([FIRST, SECOND, BROKEN, UNSENT], task())
    assert found["span_s"] == pytest.approx(1.999)
    assert found["requests_per_s"] == pytest.approx(2 / 1.999)
    assert found["output_tokens_per_s"] == pytest.approx(5 / 1.999)
    assert found["input_tokens_per_s"] == pytest.approx(16 / 1.999)
    assert (found["requests"], found["ok"], found["closed"], found["cut"]) == (4, 2, 1, 1)


@pytest.mark.parametrize(
    ("slo", "good"),
    [({}, 2), ({"slo_ttft_ms": 200}, 1), ({"slo_tpot_ms": 10}, 0), ({"slo_e2e_ms": 500.1, "slo_tpot_ms": 199}, 1)],
)
def test_goodput_counts_who_kept_all_of_it(slo: dict[str, float], good: int) -> None:
    found = figures.of([FIRST, SECOND, BROKEN, UNSENT], task(**slo))
    assert found["goodput_per_s"] == pytest.approx(good / 1.999)
    assert found["good_share"] == good / 4


def test_a_queue_is_who_waits_for_a_first_token_and_who_is_under_way() -> None:
    queue = [(round(each.at_s, 3), each.waiting, each.under_way) for each in figures.queued([FIRST, SECOND, BROKEN])]
    ended = [(1.0, 0, 1), (2.0, 0, 0)]
    assert queue == [(0.001, 1, 1), (0.101, 0, 1), (0.131, 0, 0), (0.5, 2, 2), (0.6, 1, 2), (0.8, 0, 2), *ended]


def test_a_queue_that_is_short_of_a_moment_is_seen() -> None:
    brief = [outcome(at, sent=1.0, tokens=(1.0001, 60.0)) for at in range(7)]
    found = figures.of([outcome(9, sent=0.0, tokens=(0.1, 100.0)), *brief], task())
    assert (found["waiting_max"], found["under_way_max"]) == (7, 8)
    thin = figures.thinned(figures.queued([outcome(at, sent=float(at), tokens=(at + 0.5,)) for at in range(1000)]), 50)
    assert len(thin["queue_s"]) == len(thin["queue_waiting"]) == 50
    assert (thin["queue_s"][0], thin["queue_s"][-1]) == (0.0, 999.5)


def test_who_waits_for_a_place_in_our_client_has_waited() -> None:
    """A request that was due at 0 and sent at 10 has not kept a second, however fast the server was then."""
    late = outcome(0, due=0.0, sent=10.0, tokens=(10.1, 10.2))
    assert figures.of([late], task(slo_ttft_ms=1000))["good_share"] == 0
    assert figures.of([late], task(slo_e2e_ms=1000))["good_share"] == 0
    free = outcome(0, due=math.nan, sent=10.0, tokens=(10.1, 10.2))
    found = figures.of([free], task(slo_ttft_ms=1000))
    assert found["good_share"] == 1
    assert not [key for key in found if key.startswith("lag")]  # it was due at no time
    assert json.loads(json.dumps(free.to_json(), allow_nan=False))["due_s"] is None


def test_a_server_that_read_other_tokens_than_were_meant_is_believed() -> None:
    ids = outcome(0, sent=0.0, tokens=(1.0,), told=(20, 1), wanted=1)
    assert ids.input == 8
    assert figures.of([ids], task())["input_tokens_per_s"] == pytest.approx(20)


def test_of_text_the_server_says_how_many_tokens_it_was() -> None:
    text = outcome(0, sent=0.0, tokens=(1.0, 2.0, 3.0), counted="pieces", told=(20, 5), wanted=5)
    found = figures.of([text], task())
    assert (found["input_tokens_per_s"], found["output_tokens_per_s"]) == pytest.approx((20 / 3, 5 / 3))
    assert found["tpot_ms_p50"] == pytest.approx(500)  # four tokens in two seconds


def test_repeats_that_differ_by_more_than_five_percent_are_flagged() -> None:
    def loads(*rates: float) -> list[list[Outcome]]:
        return [[outcome(at, sent=0.0, tokens=(1 / rate, 2 / rate)) for at in range(3)] for rate in rates]

    steady = figures.together(loads(100, 101, 99), task())
    assert (steady["output_tokens_per_s"], steady["ok"], steady["unsteady"]) == (pytest.approx(300), 9, 0)
    assert steady["output_tokens_per_s_half_percent"] == pytest.approx(4.3027 / 3**0.5, rel=1e-3)  # t with 2 degrees
    assert figures.together(loads(100, 120, 80), task())["unsteady"] == 1


def test_percentiles_of_repeats_are_of_all_their_requests_and_the_most_is_the_most() -> None:
    """The mean of two maxima would be 55 ms, and of two medians too."""
    quick = [outcome(at, sent=0.0, tokens=(0.010,)) for at in range(30)]
    slow = [outcome(at, sent=0.0, tokens=(0.100,)) for at in range(10)]
    found = figures.together([quick, slow], task())
    assert (found["ttft_ms_max"], found["ttft_ms_p50"]) == pytest.approx((100, 10))
    assert (found["waiting_max"], found["requests"]) == (30, 40)
    assert figures.together([], task()) == {"requests": 0, "ok": 0}


@pytest.mark.parametrize("most", [0.3, 3.7, 40.0])
def test_the_highest_rate_is_found_to_the_percent_asked_for(most: float) -> None:
    asked = []

    async def good(wanted: float, draws: int) -> bool:
        asked.append((wanted, draws))
        return wanted <= most

    found = asyncio.run(rate.highest(good, 1.0, 5.0))
    assert found.rate <= most <= found.rate * 1.05
    assert (found.bounded, found.confirmed) == (True, True)
    assert asked[-1] == (found.rate, 1)  # by another draw than that of the search
    assert len(asked) < rate.MOST_PROBES


def test_a_rate_that_no_other_draw_keeps_is_not_confirmed() -> None:
    async def good(wanted: float, draws: int) -> bool:
        return wanted <= (8.0 if not draws else 1.0)

    found = asyncio.run(rate.highest(good, 1.0, 5.0))
    assert (found.bounded, found.confirmed) == (True, False)
    assert found.rate < 8.0


def test_what_cannot_be_sent_fast_enough_has_no_bound() -> None:
    async def good(wanted: float, draws: int) -> bool:
        if wanted > 100:
            raise rate.TooFast
        return True

    found = asyncio.run(rate.highest(good, 1.0, 5.0))
    assert found == rate.Found(64.0, bounded=False, confirmed=False, undecided=128.0)


def test_a_rate_between_two_that_cannot_be_sent_is_undecided_and_ends_the_search() -> None:
    """What lies between it and the rate that was not kept may be kept: the answer does not say that it is not."""

    async def good(wanted: float, draws: int) -> bool:
        if 5 < wanted < 7:
            raise rate.TooFast
        return wanted < 5

    found = asyncio.run(rate.highest(good, 1.0, 5.0))
    assert found == rate.Found(4.0, bounded=True, confirmed=True, undecided=pytest.approx(32**0.5))


def test_a_rate_whose_other_draw_cannot_be_sent_is_an_answer_that_is_not_confirmed() -> None:
    async def good(wanted: float, draws: int) -> bool:
        if draws:
            raise rate.TooFast
        return wanted <= 8

    found = asyncio.run(rate.highest(good, 1.0, 5.0))
    assert 7.6 < found.rate <= 8
    assert found == rate.Found(found.rate, bounded=True, confirmed=False, undecided=found.rate)


def test_where_nothing_is_kept_the_highest_rate_is_none() -> None:
    async def good(wanted: float, draws: int) -> bool:
        return False

    assert asyncio.run(rate.highest(good, 1.0, 5.0)).rate == 0.0


@pytest.mark.parametrize("size", [1, 3, 1000])
def test_events_are_the_same_however_their_bytes_come(size: int) -> None:
    data = b": hello\r\nevent: x\r\ndata: one\r\n\r\ndata:two\ndata: lines\n\n\n\ndata: [DONE]\n\ndata: rest"
    events = Events()
    found = [each for at in range(0, len(data), size) for each in events.feed(data[at : at + size])]
    assert found == [b"one", b"two\nlines", b"[DONE]"]
