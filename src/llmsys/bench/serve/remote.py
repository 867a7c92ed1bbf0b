"""Servers that are spoken to by HTTP: OpenAI's completions, as most engines offer them, and TGI's own.

Requests ask for greedy tokens, and (but of TGI) that the end-of-text token ends nothing, so that every server does the
same work.
Tokens are counted by their ids where a server shows them (vLLM and SGLang do when asked), else by pieces of text that
came, and beside them stands what the server says its count is.
"""

from __future__ import annotations

import errno
import json
from collections.abc import AsyncIterator, Callable, Mapping, Sequence
from typing import Any

import aiohttp
from yarl import URL

from llmsys.bench.serve import at_once
from llmsys.bench.serve.load import Request
from llmsys.bench.serve.outcome import Failed, Outcome
from llmsys.bench.serve.sse import Events

DONE = b"[DONE]"
HEADERS = {"Content-Type": "application/json"}
KEPT_S = 4.0
"""A line that nobody uses is kept so long: uvicorn closes such lines after 5 s, and who sends just then is refused."""
FULL = (errno.EMFILE, errno.ENFILE)
SHOWN = 300
"""Characters of an error that are kept."""

PROTOCOL = (ValueError, KeyError, TypeError, AttributeError, OverflowError, RecursionError)
"""What reading an event raises that is none of the protocol's."""


class Remote:
    """At `url`. `text(ids)`: the prompt as text, for servers that take no ids (None: they do). `body`: more of each
    request. Use it as an async context; its connections are kept open from one request to the next."""

    path = "/v1/completions"

    def __init__(
        self,
        url: str,
        model: str,
        text: Callable[[Sequence[int]], str] | None = None,
        body: Mapping[str, Any] | None = None,
    ) -> None:
        self.url, self.model, self.text, self.more = url.rstrip("/"), model, text, dict(body or {})
        self._where = URL(self.url + self.path)
        self._session: aiohttp.ClientSession | None = None

    async def __aenter__(self) -> Remote:
        self._session = aiohttp.ClientSession(
            connector=aiohttp.TCPConnector(limit=0, keepalive_timeout=KEPT_S),
            timeout=aiohttp.ClientTimeout(total=None),
            cookie_jar=aiohttp.DummyCookieJar(),
            request_class=at_once.REQUEST,
        )
        return self

    async def __aexit__(self, *error: object) -> None:
        assert self._session is not None
        await self._session.close()

    def body(self, request: Request) -> dict[str, Any]:
        """Of a request."""
        prompt = list(request.prompt) if self.text is None else self.text(request.prompt)
        own = {"model": self.model, "prompt": prompt, "max_tokens": request.new, "temperature": 0, "stream": True}
        told = {"stream_options": {"include_usage": True}, "ignore_eos": True, "return_token_ids": True}
        return {key: each for key, each in {**own, **told, **self.more}.items() if each is not None}

    def count(self, event: Mapping[str, Any], outcome: Outcome) -> int:
        """Tokens that an event brings. `Failed` for one that says an error, KeyError and the like for one that is none
        of the protocol's."""
        _said(event)
        if usage := event.get("usage"):
            outcome.told = int(usage["prompt_tokens"]), int(usage["completion_tokens"])
        if times := event.get("times"):
            outcome.server |= {key: float(each) for key, each in times.items()}
        if not event["choices"]:
            return 0
        (choice,) = event["choices"]
        outcome.finish = choice.get("finish_reason") or outcome.finish
        if choice.get("token_ids") is not None:
            return len(choice["token_ids"])
        outcome.counted = "pieces"
        return int(bool(choice["text"]))

    def ready(self, request: Request) -> bytes:
        """See `client.Server`."""
        return json.dumps(self.body(request)).encode()

    async def stream(self, ready: bytes, request: Request, outcome: Outcome) -> AsyncIterator[int]:
        """See `client.Server`."""
        assert self._session is not None
        events = Events()
        try:
            async with self._session.post(self._where, data=ready, headers=HEADERS) as answer:
                if answer.status != 200:
                    said = (await answer.content.read(SHOWN)).decode(errors="replace")
                    raise Failed("error", f"HTTP {answer.status}: {said}")
                async for piece in answer.content.iter_any():
                    for event in events.feed(piece):
                        if event == DONE:
                            outcome.finish = outcome.finish or "done"
                            continue
                        try:
                            count = self.count(json.loads(event), outcome)
                        except PROTOCOL as error:
                            said = event[:SHOWN].decode(errors="replace")
                            raise Failed("malformed", f"{type(error).__name__}: {error}: {said}") from None
                        if count:
                            yield count
        except aiohttp.ClientPayloadError as error:
            raise Failed("closed", f"the stream broke off: {error}") from None
        except (aiohttp.ClientError, OSError) as error:
            if getattr(error, "errno", None) in FULL:
                why = "our client, and not the server: no more open files are allowed (ulimit -n)"
                raise Failed("error", why) from None
            status = "closed" if outcome.token_s else "refused"
            raise Failed(status, f"{type(error).__name__}: {error}") from None
        except ValueError as error:
            raise Failed("malformed", str(error)) from None
        if not outcome.finish:
            raise Failed("closed", "the stream ended before it said that it was done")


def _said(event: Mapping[str, Any]) -> None:
    """`Failed` for an event that says an error."""
    if error := event.get("error"):
        raise Failed("error", str(error)[:SHOWN])


class TGI(Remote):
    """Text Generation Inference, whose stream has a token an event. Over HTTP it cannot be told to go on behind the
    end-of-text token: such requests are `closed`."""

    path = "/generate_stream"

    def body(self, request: Request) -> dict[str, Any]:
        assert self.text is not None
        wanted = {"max_new_tokens": request.new, "do_sample": False, "details": True}
        told = {key: each for key, each in {**wanted, **self.more}.items() if each is not None}
        return {"inputs": self.text(request.prompt), "parameters": told}

    def count(self, event: Mapping[str, Any], outcome: Outcome) -> int:
        _said(event)
        if details := event.get("details"):
            outcome.told = int(details.get("input_length", -1)), int(details["generated_tokens"])
            outcome.finish = str(details.get("finish_reason") or "done")
        int(event["token"]["id"])
        return 1
