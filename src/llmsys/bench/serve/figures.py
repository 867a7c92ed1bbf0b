"""What the outcomes of a load say: throughput, latencies and their percentiles, goodput, queues."""

from __future__ import annotations

import collections
import math
from collections.abc import Sequence
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
    of all that were sent at a time of their own."""
    good = [each for each in outcomes if each.status == OK]
    told = [each for each in good if "ttft_s" in each.server]
    return {
        "ttft_ms": [each.ttft_s * 1e3 for each in good],
        "tpot_ms": [each.tpot_s * 1e3 for each in good if len(each.token_s) > 1],
        "itl_ms": [gap * 1e3 for each in good for gap in each.itl_s],
        "e2e_ms": [each.e2e_s * 1e3 for each in good],
        "added_ms": [(each.ttft_s - each.server["ttft_s"]) * 1e3 for each in told],
        "lag_ms": [each.lag_s * 1e3 for each in outcomes if each.sent_s >= 0 and not math.isnan(each.due_s)],
    }


def kept(outcome: Outcome, task: schema.Serve) -> bool:
    """Whether a request ended well, and within what it had to keep, from when it was due: what waits because our client
    sends no more at a time has waited too."""
    if outcome.status != OK:
        return False
    found = (outcome.waited_s + outcome.ttft_s, outcome.tpot_s, outcome.waited_s + outcome.e2e_s)
    asked = (task.slo_ttft_ms, task.slo_tpot_ms, task.slo_e2e_ms)
    return all(not limit or value * 1e3 <= limit for value, limit in zip(found, asked, strict=True))


def of(outcomes: Sequence[Outcome], task: schema.Serve) -> dict[str, float]:
    """Figures of one load. Throughput is over the time from the first request that was sent to the last that ended, and
    counts only what ended well."""
    good = [each for each in outcomes if each.status == OK]
    sent = [each for each in outcomes if each.sent_s >= 0]
    span = max((each.end_s for each in sent), default=0.0) - min((each.sent_s for each in sent), default=0.0)
    found: dict[str, float] = {"requests": len(outcomes), "ok": len(good), "span_s": span}
    statuses = collections.Counter(each.status for each in outcomes)
    found |= {status: statuses[status] for status in STATUSES if status != OK and statuses[status]}
    if span > 0:
        found["requests_per_s"] = len(good) / span
        found["input_tokens_per_s"] = sum(each.tokens_in for each in good) / span
        found["output_tokens_per_s"] = sum(each.tokens_out for each in good) / span
        found["goodput_per_s"] = sum(kept(each, task) for each in outcomes) / span
    found["good_share"] = sum(kept(each, task) for each in outcomes) / len(outcomes)
    found |= _distributions(outcomes)
    queue = queued(outcomes)
    found["waiting_max"] = max((each.waiting for each in queue), default=0)
    found["under_way_max"] = max((each.under_way for each in queue), default=0)
    return found


def _distributions(outcomes: Sequence[Outcome]) -> dict[str, float]:
    found: dict[str, float] = {}
    for name, values in latencies(outcomes).items():
        if values:
            marks = np.percentile(values, PERCENTILES)
            found |= {f"{name}_p{at}": float(mark) for at, mark in zip(PERCENTILES, marks, strict=True)}
            found[f"{name}_mean"] = float(np.mean(values))
            found[f"{name}_max"] = max(values)
    return found


@dataclass(frozen=True)
class Queue:
    """From a moment on: requests that were sent and have no token yet; and all that were sent and have not ended."""

    at_s: float
    waiting: int
    under_way: int


def queued(outcomes: Sequence[Outcome]) -> list[Queue]:
    """From the first that was sent to the last that ended: as it is from each moment on at which it changes."""
    changes: dict[float, list[int]] = {}
    for each in outcomes:
        if each.sent_s >= 0:
            first = each.token_s[0] if each.token_s else each.end_s
            for at_s, waits, stays in ((each.sent_s, 1, 1), (first, -1, 0), (each.end_s, 0, -1)):
                change = changes.setdefault(at_s, [0, 0])
                change[0], change[1] = change[0] + waits, change[1] + stays
    waiting = under_way = 0
    found = []
    for at_s in sorted(changes):
        waiting, under_way = waiting + changes[at_s][0], under_way + changes[at_s][1]
        found.append(Queue(at_s, waiting, under_way))
    return found


def thinned(queue: Sequence[Queue], most: int = 200) -> dict[str, list[float]]:
    """A queue over time as samples, at `most` of its moments."""
    some = [queue[at] for at in sorted({round(at) for at in np.linspace(0, len(queue) - 1, most)})] if queue else []
    return {
        "queue_s": [round(each.at_s, 4) for each in some],
        "queue_waiting": [float(each.waiting) for each in some],
        "queue_under_way": [float(each.under_way) for each in some],
    }


def together(loads: Sequence[Sequence[Outcome]], task: schema.Serve) -> dict[str, float]:
    """Of several loads of one kind. What can be counted is summed, the most is the most of all, percentiles are of all
    their requests, everything else is the mean of the loads; and of throughput the spread: half its 95 % interval, in
    percent, and whether it is unsteady."""
    repeats = [of(each, task) for each in loads]
    counts, most = ("requests", "ok", *(each for each in STATUSES if each != OK)), ("waiting_max", "under_way_max")
    found: dict[str, float] = {"requests": 0, "ok": 0}
    for key in dict.fromkeys(key for each in repeats for key in each):
        values = [each[key] for each in repeats if key in each]
        found[key] = sum(values) if key in counts else max(values) if key in most else float(np.mean(values))
    found |= _distributions([each for one in loads for each in one])
    for key in ("output_tokens_per_s", "requests_per_s"):
        values = [each.get(key, 0.0) for each in repeats]
        if len(values) > 1 and any(values):
            over = spread(values)
            found[f"{key}_half_percent"] = 100 * over.half / over.mean
            found[f"{key}_cv_percent"] = 100 * over.cv
    if "output_tokens_per_s_cv_percent" in found:
        found["unsteady"] = int(found["output_tokens_per_s_cv_percent"] > 100 * UNSTEADY)
    return found
