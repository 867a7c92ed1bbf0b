"""A load, sent as it is due: an asyncio task for each request, which notes when it was sent and when each token came.

While a load runs the client keeps times, and no more; what they say is found afterwards. What it adds to them itself is
measured against a server whose times are known (`stub`), and is printed beside the figures.
"""

from __future__ import annotations

import asyncio
import gc
import logging
import math
import time
from collections.abc import AsyncIterator, Callable, Sequence
from typing import Any, Protocol

from llmsys.bench.serve.load import Request
from llmsys.bench.serve.outcome import Failed, Outcome

log = logging.getLogger("llmsys")
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
        if not requests:
            return []
        self.outcomes = [
            Outcome(index=each.index, input=len(each.prompt), wanted=each.new, due_s=each.due_s) for each in requests
        ]
        free = asyncio.Semaphore(self.most) if self.most else None
        gc.collect()
        gc.freeze()  # a collection would be a pause of all streams
        made = [self.server.ready(each) for each in requests]
        self.begun = time.perf_counter()
        tasks = [
            asyncio.create_task(self._one(ready, request, outcome, free))
            for ready, request, outcome in zip(made, requests, self.outcomes, strict=True)
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

    async def _one(self, ready: Any, request: Request, outcome: Outcome, free: asyncio.Semaphore | None) -> None:
        try:
            if not math.isnan(request.due_s):
                await self._until(request.due_s)
            if free is None:
                await self._asked(ready, request, outcome)
            else:
                came = self.now
                async with free:
                    outcome.held_s = 0.0 if math.isnan(request.due_s) else self.now - came
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
        try:
            async with asyncio.timeout(None if self.request_s == math.inf else self.request_s):
                async for count in self.server.stream(ready, request, outcome):
                    now = self.now
                    outcome.token_s += [now] * count
            self._all_came(request, outcome)
        except Failed as error:
            outcome.status, outcome.why = error.status, str(error)
        except TimeoutError:
            outcome.status, outcome.why = "timeout", f"not done in {self.request_s:g} s"
        except Exception as error:
            log.exception("request %d", request.index)
            outcome.status, outcome.why = "error", f"{type(error).__name__}: {error}"

    def _all_came(self, request: Request, outcome: Outcome) -> None:
        """`Failed` for fewer tokens than were asked for: no server may do less work than another and look faster."""
        said = f", and finish_reason is {outcome.finish}" if outcome.finish else ""
        unknown = outcome.counted == "pieces" and outcome.told[1] < 0
        short = outcome.finish == "stop" if unknown else outcome.tokens_out < request.new
        if short or not outcome.token_s:
            raise Failed("closed", f"{outcome.tokens_out} of {request.new} tokens came{said}")
