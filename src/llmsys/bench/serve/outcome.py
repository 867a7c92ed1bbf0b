"""What came of a request: when it was sent, when each token came, and how it ended."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass, field
from typing import Any, Self

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
    """A request that did not end well: `status` of `STATUSES`, and what was the matter."""

    def __init__(self, status: str, why: str) -> None:
        super().__init__(why)
        assert status in STATUSES
        self.status = status


@dataclass(kw_only=True)
class Outcome:
    """Seconds are of one clock, from the beginning of the load. `due_s`: when it was to be sent; `sent_s`: when it was;
    `token_s`: for each token that came, when. A server that sends several at once has given them one time. `input`:
    tokens of the prompt; `told`: how many tokens, in and out, the server says there were; -1: it does not say.
    `counted`: what `token_s` has a time for: ids, or, from servers that show none, pieces of text."""

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
    finished: bool = False
    """The server has said that this was all."""
    server: dict[str, float] = field(default_factory=dict)
    """What the server says of its own times, where it does (the stub)."""

    @property
    def lag_s(self) -> float:
        """Sent so much after it was due."""
        return self.sent_s - self.due_s

    @property
    def ttft_s(self) -> float:
        """Time to the first token."""
        return self.token_s[0] - self.sent_s

    @property
    def tpot_s(self) -> float:
        """Time per output token, of those after the first; 0 where there is but one."""
        return (self.token_s[-1] - self.token_s[0]) / (len(self.token_s) - 1) if len(self.token_s) > 1 else 0.0

    @property
    def e2e_s(self) -> float:
        """To the last token."""
        return self.token_s[-1] - self.sent_s

    @property
    def itl_s(self) -> list[float]:
        """Between tokens, one after the other."""
        return [b - a for a, b in zip(self.token_s, self.token_s[1:], strict=False)]

    def to_json(self) -> dict[str, Any]:
        return dataclasses.asdict(self)

    @classmethod
    def of_json(cls, data: dict[str, Any]) -> Self:
        return cls(**{**data, "told": tuple(data["told"])})
