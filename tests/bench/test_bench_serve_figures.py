"""Claims about figures: of outcomes that are known they are what arithmetic by hand says."""

from __future__ import annotations

import asyncio

import pytest
from serve_harness import outcome, task

from llmsys.bench.serve import figures, rate
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
    queue = figures.queued([FIRST, SECOND, BROKEN], marks=2000)
    at = {round(each.at_s, 2): (each.waiting, each.under_way) for each in queue}
    assert (at[0.05], at[0.12], at[0.3], at[0.55], at[0.7], at[0.9]) == ((1, 1), (0, 1), (0, 0), (2, 2), (1, 2), (0, 2))


def test_repeats_that_differ_by_more_than_five_percent_are_flagged() -> None:
    steady = figures.together([{"output_tokens_per_s": value, "ok": 3} for value in (100, 101, 99)])
    assert (steady["output_tokens_per_s"], steady["ok"], steady["unsteady"]) == (100, 9, 0)
    assert steady["output_tokens_per_s_half_percent"] == pytest.approx(4.3027 / 3**0.5, rel=1e-3)  # t with 2 degrees
    assert figures.together([{"output_tokens_per_s": value} for value in (100, 120, 80)])["unsteady"] == 1


@pytest.mark.parametrize("most", [0.3, 3.7, 40.0])
def test_the_highest_rate_is_found_to_the_percent_asked_for(most: float) -> None:
    asked = []

    async def good(wanted: float) -> bool:
        asked.append(wanted)
        return wanted <= most

    found = asyncio.run(rate.highest(good, 1.0, 5.0))
    assert found <= most <= found * 1.05
    assert len(asked) < rate.MOST_PROBES


def test_where_nothing_is_kept_the_highest_rate_is_none() -> None:
    async def good(wanted: float) -> bool:
        return False

    assert asyncio.run(rate.highest(good, 1.0, 5.0)) == 0.0


@pytest.mark.parametrize("size", [1, 3, 1000])
def test_events_are_the_same_however_their_bytes_come(size: int) -> None:
    data = b": hello\r\nevent: x\r\ndata: one\r\n\r\ndata:two\ndata: lines\n\n\n\ndata: [DONE]\n\ndata: rest"
    events = Events()
    found = [each for at in range(0, len(data), size) for each in events.feed(data[at : at + size])]
    assert found == [b"one", b"two\nlines", b"[DONE]"]
