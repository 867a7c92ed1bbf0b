"""What came of a request: when it was sent, when each token came, and how it ended."""

from __future__ import annotations

import json
import math
from dataclasses import dataclass, field
from typing import IO, Any

OK = "ok"
STATUSES = {
    OK: "all of its tokens came",
    "refused": "nobody listened, or the line broke before an answer",
    "error": "the server answered with an error, or said one in the stream",
    "malformed": "what came was none of the protocol's",
    "closed": "the stream ended before its tokens",
    "timeout": "it took longer than task.request_s",
    "cut": "the load took longer than task.repeat_s, or was stopped",
}


class Failed(Exception):
    """A request that did not end well: `status` of `STATUSES`, and what was the matter, in one line whatever a server
    sends (pages of HTML, say)."""

    def __init__(self, status: str, why: str) -> None:
        super().__init__(" ".join(why.split()))
        assert status in STATUSES
        self.status = status


@dataclass(kw_only=True)
class Outcome:
    """Seconds are of one clock, from the beginning of the load. `due_s`: when it was to be sent, math.nan of one that
    was to be sent when another had ended; `sent_s`: when it was; `token_s`: for each token that came, when. A server
    that sends several at once has given them one time. `input`: tokens of the prompt; `told`: how many tokens, in and
    out, the server says there were; -1: it does not say. `counted`: what `token_s` has a time for: ids, or, from
    servers that show none, pieces of text. `finish`: why it says that this was all; empty as long as it has not."""

    index: int
    input: int
    wanted: int
    due_s: float
    sent_s: float = -1.0
    token_s: list[float] = field(default_factory=list)
    end_s: float = -1.0
    status: str = OK
    why: str = ""
    told: tuple[int, int] = (-1, -1)
    counted: str = "ids"
    finish: str = ""
    held_s: float = 0.0
    """So long our client had no place for it, since `task.concurrency` were under way."""
    server: dict[str, float] = field(default_factory=dict)
    """What the server says of its own times, where it does (the stub)."""

    @property
    def tokens_in(self) -> int:
        """As the server has counted them, if it says; else those that were meant."""
        return self.told[0] if self.told[0] >= 0 else self.input

    @property
    def tokens_out(self) -> int:
        """By the ids that came; where only text did, as the server has counted them, or else its pieces."""
        return self.told[1] if self.counted == "pieces" and self.told[1] >= 0 else len(self.token_s)

    @property
    def lag_s(self) -> float:
        """Sent so much after it was due and there was a place for it; math.nan of one that had no time."""
        return self.sent_s - self.due_s - self.held_s

    @property
    def waited_s(self) -> float:
        """From when it was due to when it was sent."""
        return 0.0 if math.isnan(self.due_s) else self.sent_s - self.due_s

    @property
    def ttft_s(self) -> float:
        """Time to the first token."""
        return self.token_s[0] - self.sent_s

    @property
    def tpot_s(self) -> float:
        """Time per output token, of those after the first; 0 where there is but one."""
        return (self.token_s[-1] - self.token_s[0]) / (self.tokens_out - 1) if self.tokens_out > 1 else 0.0

    @property
    def e2e_s(self) -> float:
        """To the last token."""
        return self.token_s[-1] - self.sent_s

    @property
    def itl_s(self) -> list[float]:
        """Between tokens, one after the other."""
        return [b - a for a, b in zip(self.token_s, self.token_s[1:], strict=False)]

    def left(self, file: IO[str], repeat: int) -> None:
        """As a line of `file`, of so manieth a load."""
        file.write(json.dumps({"repeat": repeat, **self.to_json()}) + "\n")
        file.flush()

    def to_json(self) -> dict[str, Any]:
        """A line of `requests.jsonl`; what is not known of time is null."""
        return {**vars(self), "due_s": None if math.isnan(self.due_s) else self.due_s}
