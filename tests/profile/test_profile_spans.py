"""Spans: once a step as the sum, warm-up left out, raw values kept."""

from __future__ import annotations

import pytest
import torch

from llmsys.profile.spans import Spans


def test_spans_of_a_step_are_summed_and_warmup_is_left_out(monkeypatch: pytest.MonkeyPatch) -> None:
    """A clock that advances one second a look: a span takes 1 s, the step around two spans 5 s."""
    seconds = iter(range(1000))
    monkeypatch.setattr("time.perf_counter", lambda: float(next(seconds)))
    spans = Spans(torch.device("cpu"), warmup=1)
    for _ in range(3):
        with spans.step():
            for _ in range(2):
                with spans("forward"):
                    pass
    assert spans.samples == {"forward_ms": [2000.0, 2000.0], "step_ms": [5000.0, 5000.0]}
    assert spans.summary == {"forward_ms_p50": 2000.0, "step_ms_p50": 5000.0}


def test_time_between_steps_belongs_to_none(monkeypatch: pytest.MonkeyPatch) -> None:
    """Evaluation and checkpoints happen there."""
    seconds = iter(range(1000))
    monkeypatch.setattr("time.perf_counter", lambda: float(next(seconds)))
    spans = Spans(torch.device("cpu"))
    for _ in range(2):
        with spans.step():
            pass
        for _ in range(100):
            next(seconds)
    assert spans.samples == {"step_ms": [1000.0, 1000.0]}


def test_the_overhead_is_stated_and_small() -> None:
    """Of a step with ten spans, far below a millisecond even on a busy machine."""
    spans = Spans(torch.device("cpu"))
    with spans.step():
        for _ in range(10):
            with spans("forward"):
                pass
    assert 0 < spans.overhead_us_per_step() < 1000


@pytest.mark.gpu
def test_cuda_spans_time_the_device_not_the_call() -> None:
    """Work queued within a span is in it, though the call returned long before."""
    spans = Spans(torch.device("cuda"))
    a = torch.ones(8192, 8192, device="cuda")
    for _ in range(2):
        with spans.step(), spans("forward"):
            for _ in range(10):
                a @ a
    assert min(spans.samples["forward_ms"]) > 5
