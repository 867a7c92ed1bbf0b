"""What a server makes of a load when its passes take as long as `pace` says, and nothing else takes any time: no
scheduler, no Python between passes, no line. So what a measured load takes longer is the engine's own.

Continuous batching (Orca, OSDI 2022): a pass has the next token of each sequence that is under way, and prompts that
wait, as many as there is room for. What two passes would each pay to begin, they pay once. Static batching: those that
wait are one batch, padded to the longest prompt, which decodes until the longest answer is done.
"""

from __future__ import annotations

import heapq
import math
from collections.abc import Sequence
from dataclasses import dataclass

from llmsys.bench.serve.load import Request
from llmsys.bench.serve.outcome import Outcome
from llmsys.bench.serve.pace import Pace


@dataclass(frozen=True, kw_only=True)
class Batching:
    """`sequences` at a time, at most; of prompts `tokens` in a pass, at most; `under_way`: requests that the client
    sends before others have ended, 0: any number."""

    static: bool = False
    sequences: int
    tokens: int
    under_way: int = 0


def predict(requests: Sequence[Request], pace: Pace, how: Batching) -> list[Outcome]:
    """One for each request, in their order, as `client.Client` would find them."""
    return _Predicted(requests, pace, how).run()


class _Predicted:
    def __init__(self, requests: Sequence[Request], pace: Pace, how: Batching) -> None:
        self.requests, self.pace, self.how = requests, pace, how
        self.outcomes = [
            Outcome(index=each.index, input=len(each.prompt), wanted=each.new, due_s=each.due_s) for each in requests
        ]
        self.due = [(0.0 if math.isnan(each.due_s) else each.due_s, at) for at, each in enumerate(requests)]
        heapq.heapify(self.due)
        self.waiting: list[int] = []
        self.under_way = 0
        self.held_back = False
        self.now = 0.0

    def run(self) -> list[Outcome]:
        running: list[int] = []
        while self._arrived() or running or self.due:
            if not self.waiting and not running:
                self.now = self.due[0][0]
                continue
            if self.how.static:
                self._batch([self.waiting.pop(0) for _ in self.waiting[: self.how.sequences]])
            else:
                running = self._step(running)
        return self.outcomes

    def _arrived(self) -> bool:
        """Takes those that are due by now; whether some wait."""
        while self.due and self.due[0][0] <= self.now:
            if 0 < self.how.under_way <= self.under_way:
                self.held_back = True
                return bool(self.waiting)
            due_s, at = heapq.heappop(self.due)
            own = self.outcomes[at]
            own.sent_s = self.now if self.held_back else due_s  # as soon as another had ended
            self.waiting.append(at)
            self.under_way += 1
        self.held_back = False
        return bool(self.waiting)

    def _step(self, running: list[int]) -> list[int]:
        """A pass; who is under way after it."""
        new, room = list[int](), self.how.tokens
        while self.waiting and len(running) + len(new) < self.how.sequences:
            prompt = len(self.requests[self.waiting[0]].prompt)
            if new and prompt > room:
                break
            room -= prompt
            new.append(self.waiting.pop(0))
        self.now += self._pass_s(new, running)
        return [at for at in (*running, *new) if not self._token(at)]

    def _pass_s(self, new: Sequence[int], running: Sequence[int]) -> float:
        reads = self.pace.prefill_s(len(new), self._mean(new)) if new else 0.0
        if not running:
            return reads
        before = round(
            sum(len(self.requests[at].prompt) + len(self.outcomes[at].token_s) for at in running) / len(running)
        )
        decodes = self.pace.decode_s(len(running), before)
        begins = min(reads, self.pace.decode_s(1, 1))
        return reads + max(0.0, decodes - begins)

    def _mean(self, some: Sequence[int]) -> int:
        return round(sum(len(self.requests[at].prompt) for at in some) / len(some))

    def _batch(self, batch: Sequence[int]) -> None:
        prompt = max(len(self.requests[at].prompt) for at in batch)
        for step in range(max(self.requests[at].new for at in batch)):
            rows = len(batch)
            self.now += self.pace.decode_s(rows, prompt + step) if step else self.pace.prefill_s(rows, prompt)
            for at in batch:
                if step < self.requests[at].new:
                    self._token(at)

    def _token(self, at: int) -> bool:
        """Whether it was the last."""
        own = self.outcomes[at]
        own.token_s.append(self.now)
        if len(own.token_s) < self.requests[at].new:
            return False
        own.end_s, own.finish = self.now, "length"
        self.under_way -= 1
        return True
