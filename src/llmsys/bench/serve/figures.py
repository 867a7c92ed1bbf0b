"""What the outcomes of a load say: throughput, latencies and their percentiles, goodput, queues."""

from __future__ import annotations

import bisect
import collections
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from llmsys import schema
from llmsys.bench.serve.outcome import OK, STATUSES, Outcome
from llmsys.spread import spread

PERCENTILES = (50, 90, 95, 99)
UNSTEADY = 0.05
"""Repeats whose throughput has a larger coefficient of variation are flagged."""


def latencies(outcomes: Sequence[Outcome]) -> dict[str, list[float]]:
    """Milliseconds by what they are of, in the order of the requests: `ttft`, `tpot`, `e2e` of those that ended well,
    `itl` of each of their tokens but the first, `added` of those whose server says when it sent the first token, `lag`
    of all that were sent."""
    good = [each for each in outcomes if each.status == OK and each.token_s]
    told = [each for each in good if "ttft_s" in each.server]
    return {
        "ttft_ms": [each.ttft_s * 1e3 for each in good],
        "tpot_ms": [each.tpot_s * 1e3 for each in good if len(each.token_s) > 1],
        "itl_ms": [gap * 1e3 for each in good for gap in each.itl_s],
        "e2e_ms": [each.e2e_s * 1e3 for each in good],
        "added_ms": [(each.ttft_s - each.server["ttft_s"]) * 1e3 for each in told],
        "lag_ms": [each.lag_s * 1e3 for each in outcomes if each.sent_s >= 0],
    }


def kept(outcome: Outcome, task: schema.Serve) -> bool:
    """Whether a request ended well, and within what it had to keep."""
    if outcome.status != OK or not outcome.token_s:
        return False
    found = (outcome.ttft_s, outcome.tpot_s, outcome.e2e_s)
    asked = (task.slo_ttft_ms, task.slo_tpot_ms, task.slo_e2e_ms)
    return all(not limit or value * 1e3 <= limit for value, limit in zip(found, asked, strict=True))


def of(outcomes: Sequence[Outcome], task: schema.Serve) -> dict[str, float]:
    """Figures of one load. Throughput is over the time from the first request that was sent to the last that ended, and
    counts only what ended well."""
    good = [each for each in outcomes if each.status == OK and each.token_s]
    sent = [each for each in outcomes if each.sent_s >= 0]
    span = max((each.end_s for each in sent), default=0.0) - min((each.sent_s for each in sent), default=0.0)
    found: dict[str, float] = {"requests": len(outcomes), "ok": len(good), "span_s": span}
    statuses = collections.Counter(each.status for each in outcomes)
    found |= {status: statuses[status] for status in STATUSES if status != OK and statuses[status]}
    if span > 0:
        found["requests_per_s"] = len(good) / span
        found["input_tokens_per_s"] = sum(each.input for each in good) / span
        found["output_tokens_per_s"] = sum(len(each.token_s) for each in good) / span
        found["goodput_per_s"] = sum(kept(each, task) for each in outcomes) / span
    found["good_share"] = sum(kept(each, task) for each in outcomes) / len(outcomes)
    for name, values in latencies(outcomes).items():
        if values:
            marks = np.percentile(values, PERCENTILES)
            found |= {f"{name}_p{at}": float(mark) for at, mark in zip(PERCENTILES, marks, strict=True)}
            found[f"{name}_mean"] = float(np.mean(values))
            found[f"{name}_max"] = max(values)
    queue = queued(outcomes)
    found["waiting_max"] = max((each.waiting for each in queue), default=0)
    found["under_way_max"] = max((each.under_way for each in queue), default=0)
    return found


@dataclass(frozen=True)
class Queue:
    """At a moment: requests that were sent and have no token yet; and all that were sent and have not ended."""

    at_s: float
    waiting: int
    under_way: int


def queued(outcomes: Sequence[Outcome], marks: int = 200) -> list[Queue]:
    """At `marks` moments, evenly."""
    sent = [each for each in outcomes if each.sent_s >= 0]
    if not sent:
        return []
    begun = sorted(each.sent_s for each in sent)
    ended = sorted(each.end_s for each in sent)
    first = sorted(each.token_s[0] if each.token_s else each.end_s for each in sent)
    found = []
    for at_s in np.linspace(begun[0], ended[-1], marks):
        count = bisect.bisect_right(begun, at_s)
        waiting = count - bisect.bisect_right(first, at_s)
        found.append(Queue(float(at_s), waiting, count - bisect.bisect_right(ended, at_s)))
    return found


def together(repeats: Sequence[Mapping[str, float]]) -> dict[str, float]:
    """Of several loads of one kind: what can be counted is summed, of all else the mean; and of throughput the spread
    of repeats: half its 95 % interval, in percent, and whether it is unsteady."""
    counts = ("requests", "ok", *(each for each in STATUSES if each != OK))
    found: dict[str, float] = {}
    for key in dict.fromkeys(key for each in repeats for key in each):
        values = [each[key] for each in repeats if key in each]
        found[key] = sum(values) if key in counts else float(np.mean(values))
    for key in ("output_tokens_per_s", "requests_per_s"):
        values = [each.get(key, 0.0) for each in repeats]
        if len(values) > 1 and any(values):
            over = spread(values)
            found[f"{key}_half_percent"] = 100 * over.half / over.mean
            found[f"{key}_cv_percent"] = 100 * over.cv
    if "output_tokens_per_s_cv_percent" in found:
        found["unsteady"] = int(found["output_tokens_per_s_cv_percent"] > 100 * UNSTEADY)
    return found
