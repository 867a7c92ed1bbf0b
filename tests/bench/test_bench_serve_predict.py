"""Claims about predicted loads: what can be said by hand of passes of known times is what comes out, and a calibration
gives back the passes that it is made of."""

from __future__ import annotations

import dataclasses
import itertools
import json
import math
from pathlib import Path

import pytest
from serve_harness import PASSES, passes_recorded

from llmsys import compose, schema
from llmsys.bench.serve import pace, slower
from llmsys.bench.serve.fit import Fit, Point
from llmsys.bench.serve.load import Request, draw
from llmsys.bench.serve.outcome import Outcome
from llmsys.bench.serve.predict import Batching, predict

READ_S, STEP_S = 0.010, 0.002
MIXED_S = READ_S  # of a pass that reads and decodes what both pay to begin is paid once


def model(*words: str) -> schema.Transformer:
    made = schema.build(compose.compose(["model=llama_tiny", *words])).model
    assert isinstance(made, schema.Transformer)
    return made


@pytest.fixture(scope="module")
def known() -> pace.Pace:
    """Each pass takes the same, however many are in it."""
    fits = {phase: Fit((Point(1, 0.0, s),), 0.0) for phase, s in ((pace.PREFILL, READ_S), (pace.DECODE, STEP_S))}
    return pace.Pace(model=model(), flops_per_s=1e12, bytes_per_s=1e11, fits=fits)


def asked(*due: float, new: int = 3, prompt: int = 8) -> list[Request]:
    return [Request(index=at, due_s=each, prompt=(4,) * prompt, new=new) for at, each in enumerate(due)]


def times(outcomes: list[Outcome]) -> list[list[float]]:
    return [[pytest.approx(each) for each in own.token_s] for own in outcomes]


CONTINUOUS = Batching(sequences=8, tokens=100)


def test_a_request_alone_is_read_and_then_decoded(known: pace.Pace) -> None:
    (one,) = predict(asked(1.0), known, CONTINUOUS)
    assert (one.sent_s, one.status, one.finish) == (1.0, "ok", "length")
    assert one.token_s == pytest.approx([1.010, 1.012, 1.014])
    assert one.end_s == one.token_s[-1]


def test_who_comes_while_others_decode_is_read_in_the_next_pass(known: pace.Pace) -> None:
    """At 11 ms the second pass is under way, until 12."""
    first, second = predict(asked(0.0, 0.011), known, CONTINUOUS)
    assert second.token_s[0] == pytest.approx(0.012 + MIXED_S)
    assert first.token_s == pytest.approx([0.010, 0.012, 0.012 + MIXED_S])
    assert second.token_s[-1] == pytest.approx(0.012 + MIXED_S + 2 * STEP_S)


def test_prompts_of_a_pass_are_no_more_than_it_takes(known: pace.Pace) -> None:
    """Of three prompts of 8 tokens two are read in one pass, and the third with the first tokens of these."""
    a, b, c = predict(asked(0.0, 0.0, 0.0), known, Batching(sequences=8, tokens=20))
    assert a.token_s == b.token_s
    assert (a.token_s[0], c.token_s[0]) == (pytest.approx(READ_S), pytest.approx(READ_S + MIXED_S))


def test_a_static_batch_runs_to_the_end_of_its_longest(known: pace.Pace) -> None:
    """The third waits until the first, which is the longest, is done."""
    long, short, third = predict(
        [*asked(0.0, new=6), *asked(0.0), *asked(0.0)], known, Batching(static=True, sequences=2, tokens=100)
    )
    assert long.token_s[:3] == short.token_s
    assert third.token_s[0] == pytest.approx(long.end_s + READ_S)


def test_as_many_are_under_way_as_the_client_allows(known: pace.Pace) -> None:
    outcomes = predict(asked(*[math.nan] * 5), known, Batching(sequences=8, tokens=100, under_way=2))
    assert [each.sent_s for each in outcomes[:2]] == [0.0, 0.0]
    ends = sorted(each.end_s for each in outcomes)
    assert [each.sent_s for each in outcomes[2:]] == pytest.approx(ends[:3])
    assert all(math.isnan(each.due_s) for each in outcomes)


@pytest.mark.parametrize("static", [False, True])
def test_every_request_gets_all_of_its_tokens_in_their_order(known: pace.Pace, static: bool) -> None:
    task = schema.Serve(arrivals="poisson", rate=200, requests=200, lengths="lognormal", spread=0.7, output_tokens=20)
    load = draw(task, 100)
    outcomes = predict(load, known, Batching(static=static, sequences=4, tokens=300))
    for own, request in zip(outcomes, load, strict=True):
        assert len(own.token_s) == request.new
        assert request.due_s == own.sent_s < own.token_s[0]
        assert all(a < b for a, b in itertools.pairwise(own.token_s))


def test_a_calibration_gives_back_the_passes_that_it_is_made_of(tmp_path: Path) -> None:
    own = pace.of_record(passes_recorded(tmp_path), model(), schema.InProcessServer())
    for batch in (1, 4):
        assert own.decode_s(batch, 8) == pytest.approx(PASSES[f"decode/{batch}x8"] / 1e3)
    assert own.decode_s(4, 32) > own.decode_s(4, 8) > own.decode_s(1, 8)
    bare = pace.Pace(model=own.model, flops_per_s=own.flops_per_s, bytes_per_s=own.bytes_per_s)
    assert bare.decode_s(4, 32) == bare.least_s(4, 1, 32)


@pytest.mark.parametrize(
    ("words", "more", "why"),
    [
        ([], {"task": "train"}, "must be a finished run of bench_serve_modules"),
        ([], {"status": "failed"}, "must be a finished run of bench_serve_modules"),
        (["model.num_layers=1"], {}, "another model were measured: model.num_layers=1 and not 2"),
        (["server.adapter=random:4"], {}, "with server.adapter=random:4 beside the weights, and not none"),
    ],
)
def test_a_calibration_of_something_else_is_refused(
    tmp_path: Path, words: list[str], more: dict[str, str], why: str
) -> None:
    with pytest.raises(ValueError, match=why):
        pace.of_record(passes_recorded(tmp_path, *words, **more), model(), schema.InProcessServer())


@pytest.mark.parametrize(("words", "merge"), [(["server.adapter=random:4"], False), ([], True)])
def test_passes_stand_for_those_with_the_same_adapter_and_merged_ones_for_none(
    tmp_path: Path, words: list[str], merge: bool
) -> None:
    server = schema.InProcessServer(adapter="random:4", merge=merge)
    assert pace.of_record(passes_recorded(tmp_path, *words), model(), server).fits


@pytest.mark.parametrize("factor", [0.4, 1.0, 2.5])
@pytest.mark.parametrize("how", [CONTINUOUS, Batching(static=True, sequences=4, tokens=100, under_way=6)])
def test_an_engine_that_takes_so_many_times_as_long_is_found_to(known: pace.Pace, how: Batching, factor: float) -> None:
    """Whatever the load: one of which some wait, and one of which some do not. Batches form otherwise when passes are
    longer, so that latencies jump."""
    loads = [asked(*[0.0] * 12, new=20), asked(*[0.03 * at for at in range(12)], new=5)]
    engine = dataclasses.replace(known, slower=factor)
    measured = [predict(load, engine, how) for load in loads]
    assert slower.of_loads(loads, measured, known, how) == pytest.approx(factor, rel=0.03)


def test_what_no_factor_explains_has_none(known: pace.Pace) -> None:
    load = asked(0.0)
    (one,) = predict(load, known, CONTINUOUS)
    one.token_s = [1e3 * each for each in one.token_s]
    assert slower.of_loads([load], [[one]], known, CONTINUOUS) is None


@pytest.mark.parametrize(
    ("words", "more", "why"),
    [
        ([], {"task": "train"}, "must be a finished run of bench_serve"),
        ([], {"status": "failed"}, "must be a finished run of bench_serve"),
        (["server.max_batch=2"], {}, "another server: server.max_batch=2 and not 64"),
        (["model.num_layers=1"], {}, "another model: model.num_layers=1 and not 2"),
        (["server.python=/elsewhere"], {"summary": {}}, "has no slower: run it with task.speeds"),
    ],
)
def test_another_engine_says_nothing_of_this_one(
    tmp_path: Path, words: list[str], more: dict[str, object], why: str
) -> None:
    own = ["task=bench_serve", "model=llama_tiny"]
    plain = {"schema": 1, "name": "x", "run_id": "a", "status": "ok", "task": "bench_serve", "env": {},
             "config": compose.compose([*own, *words]), "summary": {"slower": 1.5, "under_way_max": 8}}  # fmt: skip
    path = tmp_path / "record.json"
    path.write_text(json.dumps({**plain, **more}))
    with pytest.raises(ValueError, match=why):
        slower.of_record(path, schema.build(compose.compose(own)))
