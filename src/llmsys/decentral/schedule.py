"""A step of one pipeline, event by event: when each stage computes and when each line is busy.

Each stage goes through its forwards (F) and backwards (B) of micro-batches in the order of the schedule, each as soon
as what it needs has come. A message waits until its sender's line out and its receiver's line in are free, which carry
one at a time, of those that can go the one that waits longest; then it is on its way for alpha more.

    gpipe         F 0 ... F n-1, then B n-1 ... B 0
    1f1b          as many F as there are stages behind, then F and B in turn, then the B that are left
    eager_1f1b    the same with twice as many F before the first B, so that lines are busy meanwhile
"""

from __future__ import annotations

import heapq
import itertools
from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

from llmsys.decentral.cost import Costs, in_flight
from llmsys.decentral.order import Pipeline


class Span(NamedTuple):
    """What stage `stage` does from `begin_s` to `end_s`: `what` is F, B, or a message: `ahead` or `back`."""

    stage: int
    what: str
    micro_batch: int
    begin_s: float
    end_s: float


@dataclass(frozen=True)
class Timing:
    """Of S stages in seconds: `forward`, `backward` of one micro-batch (S,); of the S - 1 lines between them `ahead`
    and `back`, for which they are busy, and `alpha`, `alpha_back`, which passes besides. Without `backward` nothing
    comes back."""

    forward: Sequence[float]
    backward: Sequence[float]
    ahead: Sequence[float]
    back: Sequence[float]
    alpha: Sequence[float]
    alpha_back: Sequence[float]

    @classmethod
    def of(cls, costs: Costs, pipeline: Pipeline) -> Timing:
        """Of a plan's pipeline: a third of a stage's time is its forward pass, or a quarter with recomputation."""
        order, cuts = pipeline.order, pipeline.cuts
        stages = costs.stages(order, cuts)
        assert stages is not None, "a pipeline of a plan"
        passes, pairs = costs.work.passes, list(itertools.pairwise(order))
        ahead, back, _ = costs.line_s(order, cuts)
        return cls(
            forward=[each.compute_s / passes for each in stages],
            backward=[each.compute_s * (1 - 1 / passes) for each in stages] if costs.work.train else [],
            ahead=ahead,
            back=back,
            alpha=[costs.fleet.alpha_s(p, q) for p, q in pairs],
            alpha_back=[costs.fleet.alpha_s(q, p) for p, q in pairs],
        )


def orders(schedule: str, stages: int, micro_batches: int, train: bool = True) -> list[list[tuple[str, int]]]:
    """What each stage does, one after another."""
    forwards = [("F", m) for m in range(micro_batches)]
    if not train:
        return [forwards] * stages
    if schedule == "gpipe":
        return [forwards + [("B", m) for m in reversed(range(micro_batches))]] * stages
    found = []
    for stage in range(stages):
        warm = in_flight(schedule, stages - 1 - stage, micro_batches) - 1
        turns = [(what, m + warm * (what == "F")) for m in range(micro_batches - warm) for what in ("F", "B")]
        found.append(forwards[:warm] + turns + [("B", m) for m in range(micro_batches - warm, micro_batches)])
    return found


def run(timing: Timing, schedule: str, micro_batches: int) -> list[Span]:
    """All that happens, by its beginning; the step ends with the last of it."""
    return _Step(timing, schedule, micro_batches).run()


class _Step:
    def __init__(self, timing: Timing, schedule: str, micro_batches: int) -> None:
        self.timing, count = timing, len(timing.forward)
        self.todo = orders(schedule, count, micro_batches, train=bool(timing.backward))
        self.next = [0] * count
        self.busy = [False] * count
        self.sending, self.receiving = [False] * count, [False] * count
        self.waiting: list[tuple[int, str, int]] = []
        self.here = {(0, "F", m) for m in range(micro_batches)}
        self.spans: list[Span] = []
        self.events: list[tuple[float, int, str, int, str, int]] = []
        self.sequence = itertools.count()

    def run(self) -> list[Span]:
        for stage in range(len(self.busy)):
            self._start(stage, 0.0)
        while self.events:
            now, _, event, stage, what, m = heapq.heappop(self.events)
            if event == "done":
                self.busy[stage] = False
                self._send(stage, what, m, now)
            elif event == "sent":
                self.sending[stage] = self.receiving[_to(stage, what)] = False
                self._go(now)
            else:
                self.here.add((stage, what, m))
            self._start(stage, now)
        assert all(at == len(todo) for at, todo in zip(self.next, self.todo, strict=True)), "a stage has waited forever"
        return sorted(self.spans, key=lambda span: (span.begin_s, span.stage))

    def _start(self, stage: int, now: float) -> None:
        """The next of the stage, if it is free and what it needs is here."""
        if self.busy[stage] or self.next[stage] == len(self.todo[stage]):
            return
        what, m = self.todo[stage][self.next[stage]]
        if (stage, what, m) not in self.here:
            return
        seconds = (self.timing.forward if what == "F" else self.timing.backward)[stage]
        self.next[stage] += 1
        self.busy[stage] = True
        self.spans.append(Span(stage, what, m, now, now + seconds))
        self._push(now + seconds, "done", stage, what, m)

    def _send(self, stage: int, what: str, m: int, now: float) -> None:
        """What it gives on its way: to the next stage, or back to the one before."""
        last = len(self.busy) - 1
        if what == "F" and stage == last:
            if self.timing.backward:
                self.here.add((stage, "B", m))
            return
        if what == "B" and stage == 0:
            return
        self.waiting.append((stage, what, m))
        self._go(now)

    def _go(self, now: float) -> None:
        """Messages whose lines are free."""
        left = []
        for stage, what, m in self.waiting:
            to = _to(stage, what)
            if self.sending[stage] or self.receiving[to]:
                left.append((stage, what, m))
                continue
            line = min(stage, to)
            seconds = (self.timing.ahead if what == "F" else self.timing.back)[line]
            alpha = (self.timing.alpha if what == "F" else self.timing.alpha_back)[line]
            if seconds:
                self.sending[stage] = self.receiving[to] = True
                self.spans.append(Span(stage, "ahead" if what == "F" else "back", m, now, now + seconds))
                self._push(now + seconds, "sent", stage, what, m)
            self._push(now + seconds + alpha, "come", to, what, m)
        self.waiting = left

    def _push(self, when: float, event: str, stage: int, what: str, m: int) -> None:
        heapq.heappush(self.events, (when, next(self.sequence), event, stage, what, m))


def _to(stage: int, what: str) -> int:
    """Where what a stage gives goes."""
    return stage + 1 if what == "F" else stage - 1


def ends_s(spans: Sequence[Span]) -> float:
    """When the last is done."""
    return max(span.end_s for span in spans)
