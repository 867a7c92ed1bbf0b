"""A server that computes nothing and speaks OpenAI's completions: its tokens come at times that are known, and it can
do wrong what servers do wrong.

    python -m llmsys.bench.serve.stub --port 8100 --ttft-ms 20 --tpot-ms 10 --fault 500:7

The first event of each answer has the time from when the request was there to when the token was sent, by the server's
own clock: what a client finds beyond that, it and the line have added.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import sys
import time
from collections.abc import Sequence

from aiohttp import web

MOST_BYTES = 256 << 20
EVENT = b'data: {"choices": [{"index": 0, "text": " t", "token_ids": [%d]}]%s}\n\n'


class Stub:
    """`faults`: (what, every): see `schema.StubServer`."""

    def __init__(self, ttft_s: float, tpot_s: float, faults: Sequence[tuple[str, int]] = ()) -> None:
        self.ttft_s, self.tpot_s, self.faults = ttft_s, tpot_s, faults
        self.asked = 0

    def app(self) -> web.Application:
        made = web.Application(client_max_size=MOST_BYTES)
        made.add_routes([web.get("/health", self.health), web.post("/v1/completions", self.completions)])
        return made

    async def health(self, _: web.Request) -> web.Response:
        return web.Response(text="ok")

    async def completions(self, request: web.Request) -> web.StreamResponse:
        body, there = await request.json(), time.perf_counter()
        self.asked += 1
        fault = next((what for what, every in self.faults if not self.asked % every), "")
        count = int(body["max_tokens"])
        if fault == "500":
            return web.Response(status=500, text="said to be out of order")
        answer = web.StreamResponse(headers={"Content-Type": "text/event-stream", "Cache-Control": "no-cache"})
        await answer.prepare(request)
        for at in range(count):
            due = there + self.ttft_s + at * self.tpot_s
            await asyncio.sleep(max(0.0, due - time.perf_counter()))
            if at == count // 2 and fault and await self._wrong(fault, answer, request):
                return answer
            times = b"" if at else b', "times": {"ttft_s": %.7f}' % (time.perf_counter() - there)
            await answer.write(EVENT % (at, times))
        usage = {"prompt_tokens": len(body["prompt"]), "completion_tokens": count}
        last = json.dumps({"choices": [], "usage": usage}).encode()
        await answer.write_eof(b"data: " + last + b"\n\ndata: [DONE]\n\n")
        return answer

    async def _wrong(self, fault: str, answer: web.StreamResponse, request: web.Request) -> bool:
        """Whether that was all of the answer."""
        if fault == "die":
            os._exit(1)
        if fault == "malformed":
            await answer.write(b"data: {no JSON\n\n")
        elif fault == "stall":
            await asyncio.sleep(3600)
        assert request.transport is not None
        if fault == "close":
            request.transport.abort()
        return fault == "close"


def main(given: Sequence[str]) -> None:
    """Serves on loopback until it is ended."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--port", type=int, required=True)
    parser.add_argument("--ttft-ms", type=float, default=20.0)
    parser.add_argument("--tpot-ms", type=float, default=10.0)
    parser.add_argument("--fault", action="append", default=[])
    asked = parser.parse_args(given)
    faults = [(what, int(every)) for what, _, every in (each.partition(":") for each in asked.fault)]
    stub = Stub(asked.ttft_ms / 1e3, asked.tpot_ms / 1e3, faults)
    where = {"host": "127.0.0.1", "port": asked.port, "backlog": 1024}
    web.run_app(stub.app(), **where, print=None, access_log=None, handle_signals=False)


if __name__ == "__main__":
    main(sys.argv[1:])
