"""Measures what has joined: each provider's lines and device, by the wire that jobs use, one at a time."""

from __future__ import annotations

import asyncio
import dataclasses
import statistics
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from llmsys.decentral.fleet import Provider
from llmsys.decentral.hub import Hub
from llmsys.decentral.link import Credentials
from llmsys.decentral.measure import MEASURE, MEASURED, MOST_BYTES
from llmsys.decentral.planes import Arrays
from llmsys.decentral.reach import Reach
from llmsys.decentral.wire import BROKER, Array, Frame, Malformed, decode, encode

ROUNDS = 5
LEAST_BYTES = 64 << 10
LONG_S = 0.5
"""A transfer of so long says how fast a line is."""
PATIENCE_S = 60.0
"""For an answer: some 32 MiB over 4 Mbit/s."""
SIZE = 4096
"""Of matrices: a layer's of LLaMA-7B."""


@dataclass(frozen=True, kw_only=True)
class Measured:
    """`machine` as it says that it is; round trip, 10**6 bit/s each way; fp32 TFLOP/s of products of many and of `few`
    rows, which are limited by computing and by memory; free memory of its host."""

    machine: Provider
    rtt_ms: float
    up_mbit: float
    down_mbit: float
    tflops: float
    few_tflops: float
    free_gib: float

    def provider(self, *, few: bool = False) -> Provider:
        """As a planner takes it: all that was measured is reached. Of memory what it offers, and is free."""
        return dataclasses.replace(
            self.machine,
            tflops=self.few_tflops if few else self.tflops,
            efficiency=1.0,
            mem_gib=min(self.machine.mem_gib, self.free_gib),
            up_mbit=self.up_mbit,
            down_mbit=self.down_mbit,
        )


class Probe:
    """A broker without a job. `rows`: the few of `Measured`."""

    def __init__(
        self, token: str, rows: int, said: Callable[[str], None] = lambda text: None, trusted_token: str = ""
    ) -> None:
        self.rows, self.said = rows, said
        self.hub = Hub(token, self._joined, self._heard, self._closed, trusted_token=trusted_token)
        self.machines: dict[str, Provider] = {}
        self._came = asyncio.Event()
        self._answers: dict[int, asyncio.Future[Frame]] = {}
        self._asked: dict[int, str] = {}

    async def run(
        self,
        host: str,
        port: int,
        count: int,
        wait_s: float,
        credentials: Credentials | None = None,
        ready: Callable[[int], None] = lambda port: None,
    ) -> list[Measured]:
        """Of `count` providers, or as many as have come in `wait_s`. ConnectionError where there is none; those that go
        meanwhile are left out."""
        await self.hub.listen(host, port, credentials)
        ready(self.hub.port)
        try:
            await self._wait(count, wait_s)
            found = []
            for name in sorted(self.machines):
                try:
                    found.append(await self._measured(name))
                except (ConnectionError, TimeoutError, Malformed) as error:
                    self.said(f"{name}: left out: {str(error) or 'no answer'}")
        finally:
            await self.hub.close()
        if not found:
            raise ConnectionError(f"listen={host}:{self.hub.port}: no provider came in {wait_s:g} s that answers")
        return found

    async def _wait(self, count: int, wait_s: float) -> None:
        try:
            async with asyncio.timeout(wait_s):
                while len(self.machines) < count:
                    self._came.clear()
                    await self._came.wait()
        except TimeoutError:
            self.said(f"{len(self.machines)} of {count} providers have come in {wait_s:g} s")

    async def _measured(self, name: str) -> Measured:
        trips = [(await self._ask(name, {"bytes": 0}))[0] for _ in range(ROUNDS)]
        rtt_s = statistics.median(trips)
        down = await self._line(name, rtt_s, lambda n: ({"bytes": 0}, {"bytes": Array.of_bytes(bytes(n))}))
        up = await self._line(name, rtt_s, lambda n: ({"bytes": n}, {}))
        _, many = await self._ask(name, {"matmul": [min(SIZE, 1024), SIZE]})
        _, few = await self._ask(name, {"matmul": [self.rows, SIZE]})
        try:
            own = Measured(
                machine=self.machines[name],
                rtt_ms=rtt_s * 1e3,
                up_mbit=up,
                down_mbit=down,
                tflops=float(many.body["tflops"]),
                few_tflops=float(few.body["tflops"]),
                free_gib=float(many.body["free_gib"]),
            )
            own.provider(), own.provider(few=True)
        except (KeyError, TypeError, ValueError) as error:
            raise Malformed(f"an answer that is none: {error}") from None
        return own

    async def _line(self, name: str, rtt_s: float, asked: Callable[[int], tuple[dict[str, Any], Arrays]]) -> float:
        """10**6 bit/s: larger messages, until one takes long enough."""
        count = LEAST_BYTES
        while True:
            took, _ = await self._ask(name, *asked(count))
            took = max(took - rtt_s, 1e-6)
            if took > LONG_S or 2 * count > MOST_BYTES:
                return count * 8e-6 / took
            count *= 2

    async def _ask(self, name: str, body: dict[str, Any], tensors: Arrays | None = None) -> tuple[float, Frame]:
        """(seconds, answer)."""
        if name not in self.hub.queues:
            raise ConnectionError("has gone")
        loop, number = asyncio.get_running_loop(), len(self._asked)
        self._asked[number] = name
        self._answers[number] = loop.create_future()
        data = encode(Frame(kind=MEASURE, sender=BROKER, to=name, body={**body, "id": number}, tensors=tensors or {}))
        begin = loop.time()
        self.hub.send(name, data)
        async with asyncio.timeout(PATIENCE_S):
            found = await self._answers[number]
        return loop.time() - begin, found

    # --- what comes ---

    def _joined(self, machine: Provider, life: str, reach: Reach | None) -> None:
        self.machines[machine.name] = machine
        self.said(f"{machine.name}: has come")
        self._came.set()

    def _heard(self, name: str, data: bytes) -> None:
        try:
            frame = decode(data)
        except Malformed:
            return  # and whoever waits for it goes on without
        number = frame.body.get("id")
        if frame.kind == MEASURED and type(number) is int and self._asked.get(number) == name:
            if not self._answers[number].done():
                self._answers[number].set_result(frame)
        elif frame.kind == "refused":
            for each, future in self._answers.items():
                if self._asked[each] == name and not future.done():
                    future.set_exception(ConnectionError(str(frame.body.get("why"))[:200]))

    def _closed(self, name: str) -> None:
        self.machines.pop(name, None)
        for number, future in self._answers.items():
            if self._asked[number] == name and not future.done():
                future.set_exception(ConnectionError("has gone"))
