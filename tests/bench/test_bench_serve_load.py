"""Claims about loads: the same seed is the same load; what is drawn has the rate and lengths that were asked for."""

from __future__ import annotations

import itertools
import math
import statistics
from pathlib import Path

import pytest
from serve_harness import task

from llmsys.bench.serve.load import FIRST, draw, probe, read_trace, warming

VOCABULARY = 512


def test_the_same_seed_is_the_same_load_and_each_repeat_has_prompts_of_its_own() -> None:
    own = task(requests=8, lengths="lognormal", spread=0.5)
    assert draw(own, VOCABULARY, 1) == draw(own, VOCABULARY, 1)
    first, second = draw(own, VOCABULARY, 0), draw(own, VOCABULARY, 1)
    assert not {each.prompt[:4] for each in first} & {each.prompt[:4] for each in second}
    assert draw(task(requests=8, seed=1), VOCABULARY) != draw(task(requests=8), VOCABULARY)


def test_no_special_token_is_drawn_and_no_other() -> None:
    ids = {each for request in draw(task(requests=64, prompt_tokens=64), VOCABULARY) for each in request.prompt}
    assert ids == set(range(FIRST, VOCABULARY))


def test_a_prefix_is_shared_by_all_requests_of_all_repeats_and_by_none_unless_asked_for() -> None:
    own = task(requests=4, prompt_tokens=32, shared_prefix=16)
    heads = {each.prompt[:16] for repeat in range(2) for each in draw(own, VOCABULARY, repeat)}
    assert len(heads) == 1
    assert len({each.prompt for each in draw(own, VOCABULARY)}) == 4
    assert all(len(each.prompt) == 32 for each in draw(own, VOCABULARY))
    assert len({each.prompt[:2] for each in draw(task(requests=4), VOCABULARY)}) == 4


@pytest.mark.parametrize("burstiness", [0.25, 1.0, 4.0])
def test_gaps_have_the_mean_of_the_rate_and_the_deviation_of_a_gamma_distribution(burstiness: float) -> None:
    own = task(arrivals="poisson", rate=50, burstiness=burstiness, requests=4000, prompt_tokens=1)
    due = [0.0, *(each.due_s for each in draw(own, VOCABULARY))]
    gaps = [b - a for a, b in itertools.pairwise(due)]
    assert statistics.fmean(gaps) == pytest.approx(1 / 50, rel=0.1)
    assert statistics.stdev(gaps) == pytest.approx(1 / 50 / math.sqrt(burstiness), rel=0.1)


def test_other_arrivals_are_as_they_are_called() -> None:
    assert {each.due_s for each in draw(task(requests=3), VOCABULARY)} == {0.0}
    constant = draw(task(arrivals="constant", rate=4, requests=3), VOCABULARY)
    assert [each.due_s for each in constant] == [0.0, 0.25, 0.5]
    assert all(math.isnan(e.due_s) for e in draw(task(arrivals="concurrency", concurrency=2, requests=3), VOCABULARY))


def test_lengths_have_the_middle_and_the_spread_that_were_asked_for() -> None:
    own = task(requests=4000, lengths="lognormal", spread=0.5, prompt_tokens=100, output_tokens=40)
    drawn = draw(own, VOCABULARY)
    assert statistics.median(len(each.prompt) for each in drawn) == pytest.approx(100, rel=0.05)
    assert statistics.stdev(math.log(each.new) for each in drawn) == pytest.approx(0.5, rel=0.1)
    uniform = draw(task(requests=400, lengths="uniform", spread=0.5, prompt_tokens=100), VOCABULARY)
    assert 50 <= min(len(e.prompt) for e in uniform) < 60 < 140 < max(len(e.prompt) for e in uniform) <= 150


def test_a_trace_is_replayed_by_arrival(tmp_path: Path) -> None:
    path = tmp_path / "trace.csv"
    path.write_text("arrival_s,input_tokens,output_tokens\n2.5,7,3\n0.5,9,4\n")
    own = task(arrivals="trace", trace=str(path))
    assert [(each.due_s, len(each.prompt), each.new) for each in draw(own, VOCABULARY)] == [(0.0, 9, 4), (2.0, 7, 3)]


def test_a_trace_is_as_long_as_asked_for_or_whole_and_warming_up_does_not_wait_for_its_arrivals(tmp_path: Path) -> None:
    path = tmp_path / "trace.csv"
    rows = [f"{1_700_000_000 + at},7,3" for at in range(100)]
    path.write_text("\n".join(["arrival_s,input_tokens,output_tokens", *rows]))
    own = task(arrivals="trace", trace=str(path), warmup=3, requests=0)
    assert [each.due_s for each in draw(own, VOCABULARY)] == [float(at) for at in range(100)]
    assert len(draw(task(arrivals="trace", trace=str(path), requests=10), VOCABULARY)) == 10
    assert [(each.due_s, len(each.prompt)) for each in warming(own, VOCABULARY)] == [(0.0, 7)] * 3


def test_probes_hold_a_rate_and_differ_in_nothing_else_but_their_prompts() -> None:
    own = task(requests=10, max_rate=True, slo_e2e_ms=1.0, probe_s=20.0, lengths="lognormal", spread=0.5, warmup=0)
    slow, fast = probe(own, VOCABULARY, 0, 10.0), probe(own, VOCABULARY, 1, 40.0)
    assert (len(slow), len(fast)) == (200, 800)
    assert [each.due_s for each in slow] == pytest.approx([4 * each.due_s for each in fast[:200]])
    assert [(len(e.prompt), e.new) for e in slow] == [(len(e.prompt), e.new) for e in fast[:200]]
    assert not {each.prompt[:4] for each in slow} & {each.prompt[:4] for each in fast}
    assert fast[-1].due_s == pytest.approx(20.0, rel=0.1)
    other = probe(own, VOCABULARY, 2, 10.0, draws=1)
    assert [each.due_s for each in other] != pytest.approx([each.due_s for each in slow])
    longest = max(len(each.prompt) + each.new for each in draw(own, VOCABULARY))
    assert max(len(each.prompt) + each.new for each in slow) <= longest  # what was checked before anything began


@pytest.mark.parametrize(
    ("text", "why"),
    [
        ("arrival_s,input_tokens\n1,2\n", "lacks the columns output_tokens"),
        ("arrival_s,input_tokens,output_tokens\n1,2,3\n1,x,3\n", "line 3: must be seconds and two numbers"),
        ("arrival_s,input_tokens,output_tokens\nnan,2,3\n", "line 2"),
        ("arrival_s,input_tokens,output_tokens\n", "has no rows"),
        ("\udcff\udcfe", "is no CSV file"),
        (None, "No such file"),
    ],
)
def test_a_trace_that_is_none_is_named_with_its_line(tmp_path: Path, text: str | None, why: str) -> None:
    path = tmp_path / "trace.csv"
    if text is not None:
        path.write_bytes(text.encode(errors="surrogateescape"))
    with pytest.raises(ValueError, match=f"^task.trace={path}: .*{why}"):
        read_trace(path)


@pytest.mark.parametrize(
    ("settings", "why"),
    [
        ({"arrivals": "poisson"}, "task.rate=0: task.arrivals=poisson needs"),
        ({"arrivals": "poisson", "max_rate": True, "slo_ttft_ms": 9}, "task.rate=0: task.arrivals=poisson needs"),
        ({"arrivals": "concurrency"}, "task.concurrency=0: "),
        ({"arrivals": "trace"}, "task.trace: a CSV file"),
        ({"shared_prefix": 128}, "task.shared_prefix=128: must be less"),
        ({"max_rate": True}, "task.max_rate=true: needs"),
        ({"lengths": "uniform", "spread": 1.0}, "task.spread=1.0"),
    ],
)
def test_a_mistake_is_named(settings: dict[str, object], why: str) -> None:
    with pytest.raises(ValueError, match=f"^{why}"):
        task(**settings)
