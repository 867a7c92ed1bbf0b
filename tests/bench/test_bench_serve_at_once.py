"""Claims about when a request is written: when it is made, and not after all else that the event loop has to do; and
one that the line does not take at once is written as the line takes it. Real sockets, and a server that reads when it
is told to."""

from __future__ import annotations

import asyncio
import contextlib
import math
import select
import socket
import threading
from collections.abc import Callable, Iterator

import pytest

from llmsys.bench.serve.at_once import Begun
from llmsys.bench.serve.client import Client
from llmsys.bench.serve.load import Request
from llmsys.bench.serve.outcome import Outcome
from llmsys.bench.serve.remote import Remote

HEAD = b"HTTP/1.1 200 OK\r\nContent-Type: text/event-stream\r\nContent-Length: %d\r\n\r\n"
EVENT = b'data: {"choices": [{"text": "", "token_ids": [1], "finish_reason": "length"}]}\n\n'
ASKED = Request(index=0, due_s=math.nan, prompt=(1, 2), new=1)
BEYOND_BUFFERS = 16 << 20


@contextlib.contextmanager
def listening() -> Iterator[tuple[socket.socket, str]]:
    with socket.socket() as listener:
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
        listener.bind(("127.0.0.1", 0))
        listener.listen()
        listener.settimeout(30)
        yield listener, f"http://127.0.0.1:{listener.getsockname()[1]}"


def read(line: socket.socket) -> int:
    """Bytes of a request's body, all of which were taken from the line."""
    came = b""
    while b"\r\n\r\n" not in came:
        came += line.recv(1 << 16)
    head, _, body = came.partition(b"\r\n\r\n")
    length = next(
        int(each.split(b":")[1]) for each in head.split(b"\r\n") if each.lower().startswith(b"content-length")
    )
    left = length - len(body)
    while left:
        left -= len(line.recv(1 << 20))
    return length


def test_a_request_is_written_before_whatever_else_waits_for_the_event_loop() -> None:
    lines = []

    def first(listener: socket.socket) -> None:
        lines.append(listener.accept()[0])
        read(lines[0])
        lines[0].sendall(HEAD % len(EVENT) + EVENT)

    async def run(url: str) -> bool:
        async with Remote(url, "none") as remote:
            answered = threading.Thread(target=first, args=(listener,))
            answered.start()
            (outcome,) = await Client(remote).run([ASKED])  # the line is open, and is used again
            await asyncio.to_thread(answered.join)
            assert outcome.status == "ok"
            there: asyncio.Future[bool] = asyncio.get_running_loop().create_future()
            asking = asyncio.create_task(Client(remote).run([ASKED]))
            await asyncio.sleep(0)  # it begins, and has made a task of the request
            asyncio.get_running_loop().call_soon(lambda: there.set_result(bool(select.select(lines, [], [], 0)[0])))
            found = await there
            asking.cancel()
            with contextlib.suppress(asyncio.CancelledError):
                await asking
            return found

    with listening() as (listener, url):
        assert asyncio.run(run(url))
        lines[0].close()


def test_what_has_run_already_can_be_cancelled() -> None:
    async def run() -> None:
        async def nothing() -> None:
            pass

        async def something() -> None:
            await asyncio.sleep(60)

        for each in (nothing, something):
            task = asyncio.create_task(Begun(each()))
            task.cancel()
            with pytest.raises(asyncio.CancelledError):
                await task

    asyncio.run(run())


def sent(url: str, request_s: float, then: Callable[[], object] = lambda: None) -> Outcome:
    """What comes of a request that no buffer holds; `then` has been called when the event loop ends."""

    async def run() -> Outcome:
        async with Remote(url, "none", lambda ids: "x" * BEYOND_BUFFERS) as remote:
            (outcome,) = await Client(remote, request_s=request_s).run([ASKED])
        await asyncio.to_thread(then)
        return outcome

    return asyncio.run(run())


@pytest.mark.filterwarnings("ignore:Sending a large body:ResourceWarning")
def test_what_the_line_does_not_take_at_once_is_written_as_it_does() -> None:
    lengths = []

    def answer(listener: socket.socket) -> None:
        line = listener.accept()[0]
        with line:
            lengths.append(read(line))
            line.sendall(HEAD % len(EVENT) + EVENT)

    with listening() as (listener, url):
        server = threading.Thread(target=answer, args=(listener,))
        server.start()
        outcome = sent(url, 60)
        server.join()
    assert (outcome.status, outcome.why) == ("ok", "")
    assert lengths[0] > BEYOND_BUFFERS


@pytest.mark.filterwarnings("ignore:Sending a large body:ResourceWarning")
def test_a_server_that_takes_no_request_is_a_timeout() -> None:
    done = threading.Event()

    def late(listener: socket.socket) -> None:
        with listener.accept()[0] as line:
            done.wait(60)
            while line.recv(1 << 20):
                pass

    with listening() as (listener, url):
        server = threading.Thread(target=late, args=(listener,))
        server.start()
        assert sent(url, 0.5, lambda: (done.set(), server.join())).status == "timeout"
