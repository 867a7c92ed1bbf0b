"""A load, sent as it is due: an asyncio task for each request, which notes when it was sent and when each token came.

Nothing is computed while a load runs: the client keeps times, and what they say is found afterwards. What it adds to
them itself is measured against a server whose times are known (`stub`), and is printed beside the figures.
"""

from __future__ import annotations

import asyncio
import gc
import math
import time
from collections.abc import AsyncIterator, Callable, Sequence
from typing import Any, Protocol

from llmsys.bench.serve.load import Request
from llmsys.bench.serve.outcome import Failed, Outcome

FINE_S = 0.002
"""The event loop wakes up a millisecond late; the last of a wait is asked for again and again."""


class Server(Protocol):
    """Who answers. `ready` makes of a request what can be made before it is due. `stream` sends that, and yields how
    many tokens have come, each time that some have; it may note in the outcome what the server says. It raises
    `Failed` where a request does not end well."""

    def ready(self, request: Request) -> Any: ...

    def stream(self, ready: Any, request: Request, outcome: Outcome) -> AsyncIterator[int]: ...


class Client:
    """Of one load on `server`. At most `most` requests are under way (0: any number); each has `request_s` seconds, and
    all together `all_s`. `ended(outcome)` is called with each."""

    def __init__(
        self,
        server: Server,
        *,
        most: int = 0,
        request_s: float = math.inf,
        all_s: float = math.inf,
        ended: Callable[[Outcome], None] = lambda outcome: None,
    ) -> None:
        self.server, self.most, self.request_s, self.all_s, self.ended = server, most, request_s, all_s, ended
        self.begun = 0.0
        self.outcomes: list[Outcome] = []

    @property
    def now(self) -> float:
        return time.perf_counter() - self.begun

    async def run(self, requests: Sequence[Request]) -> list[Outcome]:
        """One outcome for each request, in their order; nothing that a server does is raised."""
        self.outcomes = [
            Outcome(index=each.index, input=len(each.prompt), wanted=each.new, due_s=each.due_s) for each in requests
        ]
        free = asyncio.Semaphore(self.most) if self.most else None
        gc.collect()
        gc.freeze()  # a collection would be a pause of all streams
        self.begun = time.perf_counter()
        tasks = [
            asyncio.create_task(self._one(request, outcome, free))
            for request, outcome in zip(requests, self.outcomes, strict=True)
        ]
        try:
            _, late = await asyncio.wait(tasks, timeout=None if self.all_s == math.inf else self.all_s)
        except asyncio.CancelledError:
            late = {each for each in tasks if not each.done()}
            await self._cut(late, "the run was stopped")
            raise
        finally:
            gc.unfreeze()
        await self._cut(late, f"the load took more than {self.all_s:g} s")
        for task in tasks:
            task.result()
        return self.outcomes

    async def _cut(self, late: set[asyncio.Task[None]], why: str) -> None:
        for task in late:
            task.cancel(why)
        if late:
            await asyncio.wait(late)

    async def _one(self, request: Request, outcome: Outcome, free: asyncio.Semaphore | None) -> None:
        try:
            ready = self.server.ready(request)
            if not math.isnan(request.due_s):
                await self._until(request.due_s)
            if free is None:
                await self._asked(ready, request, outcome)
            else:
                async with free:
                    await self._asked(ready, request, outcome)
        except asyncio.CancelledError as error:
            outcome.status, outcome.why = "cut", str(error)
        outcome.end_s = self.now
        self.ended(outcome)

    async def _until(self, due_s: float) -> None:
        if (wait := due_s - self.now - FINE_S) > 0:
            await asyncio.sleep(wait)
        while self.now < due_s:
            await asyncio.sleep(0)

    async def _asked(self, ready: Any, request: Request, outcome: Outcome) -> None:
        outcome.sent_s = self.now
        if math.isnan(outcome.due_s):
            outcome.due_s = outcome.sent_s
        try:
            async with asyncio.timeout(None if self.request_s == math.inf else self.request_s):
                async for count in self.server.stream(ready, request, outcome):
                    now = self.now
                    outcome.token_s += [now] * count
            if len(outcome.token_s) < request.new and outcome.counted == "ids":
                raise Failed("closed", f"{len(outcome.token_s)} of {request.new} tokens came")
        except Failed as error:
            outcome.status, outcome.why = error.status, str(error)
        except TimeoutError:
            outcome.status, outcome.why = "timeout", f"not done in {self.request_s:g} s"
