"""Claims about the client: it keeps what came when; whatever a server does, each request ends in a status that says it;
and no server is left behind. Real servers on real sockets."""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import AsyncIterator, Awaitable, Callable
from pathlib import Path
from typing import Any, ClassVar

import pytest
from aiohttp import web
from serve_harness import stub, task

from llmsys.bench.serve import words
from llmsys.bench.serve.client import Client
from llmsys.bench.serve.life import Life, NotUp, free_port
from llmsys.bench.serve.load import draw
from llmsys.bench.serve.outcome import Outcome
from llmsys.bench.serve.remote import TGI, Remote
from llmsys.bench.serve.watch import Watch

SMALL = task(requests=6, prompt_tokens=4, output_tokens=6)


def loaded(folder: Path, *words: str, request_s: float = 20.0, all_s: float = 60.0, most: int = 0) -> list[Outcome]:
    async def run() -> list[Outcome]:
        async with stub(folder, "--ttft-ms=5", "--tpot-ms=2", *words) as (remote, _):
            client = Client(remote, request_s=request_s, all_s=all_s, most=most)
            return await client.run(draw(SMALL, 64))

    return asyncio.run(run())


def test_each_token_has_its_time_and_the_server_says_the_same_count(tmp_path: Path) -> None:
    for each in loaded(tmp_path):
        assert (each.status, len(each.token_s), each.told, each.counted) == ("ok", 6, (4, 6), "ids")
        assert each.token_s == sorted(each.token_s)
        assert each.sent_s + 0.005 <= each.token_s[0]
        assert each.token_s[-1] >= each.sent_s + 0.005 + 5 * 0.002  # no token before the server sent it


@pytest.mark.parametrize(
    ("words", "status", "why"),
    [
        (["--fault=500:2"], "error", "HTTP 500: said to be out of order"),
        (["--fault=close:2"], "closed", "broke off"),
        (["--fault=malformed:2"], "malformed", "no JSON"),
        (["--fault=stall:2"], "timeout", "not done in 1 s"),
    ],
)
def test_whatever_a_server_does_the_request_says_it_and_the_others_end_well(
    tmp_path: Path, words: list[str], status: str, why: str
) -> None:
    found = loaded(tmp_path, *words, request_s=1.0)
    wrong = [each for each in found if each.status != "ok"]
    assert len(wrong) == 3
    assert all(each.status == status and why in each.why for each in wrong)


def test_a_server_that_dies_ends_what_was_under_way_and_refuses_the_rest(tmp_path: Path) -> None:
    found = loaded(tmp_path, "--fault=die:3", most=2)
    assert [each.status for each in found[:1]] == ["ok"]
    assert {each.status for each in found} == {"ok", "closed", "refused"}


def test_a_load_that_takes_too_long_is_cut(tmp_path: Path) -> None:
    begun = time.monotonic()
    found = loaded(tmp_path, "--fault=stall:1", all_s=0.5)
    assert {each.status for each in found} == {"cut"}
    assert all(len(each.token_s) == 3 for each in found)  # what came before it is kept
    assert time.monotonic() - begun < 15


def test_no_more_are_under_way_than_were_asked_for(tmp_path: Path) -> None:
    marks = sorted(mark for e in loaded(tmp_path, most=2) for mark in ((e.sent_s, 1), (e.end_s, -1)))
    count = most = 0
    for _, step in sorted(marks, key=lambda mark: (mark[0], mark[1])):
        count += step
        most = max(most, count)
    assert most == 2


def test_what_waits_for_a_place_is_not_sent_late(tmp_path: Path) -> None:
    """A burst of which two may be under way: the last is sent long after it was due, and not by our client's fault."""
    last = max(loaded(tmp_path, most=2), key=lambda each: each.sent_s)
    assert last.held_s > 0
    assert last.lag_s < last.waited_s / 2


def test_a_load_of_no_requests_is_none() -> None:
    assert asyncio.run(Client(Remote("http://127.0.0.1:1", "nobody")).run([])) == []


Answer = Callable[[web.Request], Awaitable[web.StreamResponse]]


@contextlib.asynccontextmanager
async def serving(path: str, answer: Answer, method: str = "POST") -> AsyncIterator[str]:
    """Where somebody answers so, on a real socket."""
    app, port = web.Application(), free_port()
    app.router.add_route(method, path, answer)
    runner = web.AppRunner(app)
    await runner.setup()
    await web.TCPSite(runner, "127.0.0.1", port).start()
    try:
        yield f"http://127.0.0.1:{port}"
    finally:
        await runner.cleanup()


def asked_of(path: str, answer: Answer, made: Callable[[str], Remote]) -> list[Outcome]:
    """What comes of the small load."""

    async def run() -> list[Outcome]:
        async with serving(path, answer) as url, made(url) as remote:
            return await Client(remote).run(draw(SMALL, 64))

    return asyncio.run(run())


@pytest.mark.parametrize(("ends", "status"), [(True, "ok"), (False, "closed")])
def test_tgi_has_a_token_an_event_and_says_how_many_at_the_end(ends: bool, status: str) -> None:
    """By its own protocol, as its documentation has it, on a real socket."""
    asked = []

    async def answer(request: web.Request) -> web.StreamResponse:
        asked.append(await request.json())
        stream = web.StreamResponse(headers={"Content-Type": "text/event-stream"})
        await stream.prepare(request)
        for at in range(6 if ends else 3):
            event = {"index": at + 1, "token": {"id": 7, "text": " t7", "special": False}, "details": None}
            if at == 5:
                event |= {"generated_text": " t7" * 6, "details": {"generated_tokens": 6, "input_length": 4}}
            await stream.write(b"data:" + json.dumps(event).encode() + b"\n\n")
        await stream.write_eof()
        return stream

    for each in asked_of("/generate_stream", answer, lambda url: TGI(url, "tgi", words.text)):
        assert (each.status, len(each.token_s)) == (status, 6 if ends else 3)
        assert each.told == ((4, 6) if ends else (-1, -1))
    assert {len(each["inputs"].split()) for each in asked} == {4}
    assert {each["parameters"]["max_new_tokens"] for each in asked} == {6}


ANSWERS = {
    "stops early": ([{"text": "a", "finish_reason": None}, {"text": "b", "finish_reason": "stop"}], "closed", "of 6"),
    "says nothing": ([{"text": "", "finish_reason": "stop"}], "closed", "0 of 6 tokens came"),
    "counts to infinity": ([{"text": "a", "usage": 1e999}], "malformed", "OverflowError"),
    "no error": ([*[{"text": "a", "error": None}] * 6, {"text": "", "finish_reason": "length"}], "ok", ""),
    "an error": ([{"text": "a", "error": {"message": "no room"}}], "error", "no room"),
}


@pytest.mark.parametrize("kind", ANSWERS)
def test_an_answer_that_is_not_what_was_asked_for_is_none(kind: str) -> None:
    """Of a server that shows no ids: less work must not look like speed."""
    events, status, why = ANSWERS[kind]

    async def answer(request: web.Request) -> web.StreamResponse:
        stream = web.StreamResponse(headers={"Content-Type": "text/event-stream"})
        await stream.prepare(request)
        for each in events:
            more = {"error": each["error"]} if "error" in each else {}
            if "usage" in each:
                more = {"usage": {"prompt_tokens": each["usage"], "completion_tokens": 1}}
            event = {"choices": [{"text": each["text"], "finish_reason": each.get("finish_reason")}], **more}
            await stream.write(b"data: " + json.dumps(event).encode() + b"\n\n")
        await stream.write_eof()
        return stream

    for each in asked_of("/v1/completions", answer, lambda url: Remote(url, "x", words.text)):
        assert (each.status, why in each.why) == (status, True), each


def test_a_page_that_says_an_error_is_said_in_one_line() -> None:
    """Of a web server that is no server of a model, which answers in HTML of many lines."""

    async def answer(request: web.Request) -> web.StreamResponse:
        return web.Response(status=501, text="<html>\n  <p>Unsupported\r\n  method</p>\n</html>\n")

    for each in asked_of("/v1/completions", answer, lambda url: Remote(url, "x")):
        assert (each.status, each.why) == ("error", "HTTP 501: <html> <p>Unsupported method</p> </html>")


def test_a_static_batch_that_nobody_waits_for_is_not_done() -> None:
    """A load that was cut leaves nothing to do for the next one, and none is waited for at the end."""
    from llmsys.bench.serve.in_process import Static

    class Model:
        device = "cpu"
        steps: ClassVar[list[int]] = []

        def generate(self, ids: Any, *, stopping_criteria: Any, max_new_tokens: int, **more: Any) -> None:
            for _ in range(max_new_tokens):
                time.sleep(0.01)
                if bool(stopping_criteria(ids, None).all()):
                    return
                self.steps.append(len(ids))

    async def run() -> list[Outcome]:
        with Static(Model(), 2) as server:
            return await Client(server, all_s=0.3).run(draw(task(requests=40, output_tokens=10_000), 64))

    begun = time.monotonic()
    assert {each.status for each in asyncio.run(run())} == {"cut"}
    assert 0 < len(Model.steps) < 1000  # of 200,000
    assert time.monotonic() - begun < 30


def test_what_a_server_tells_of_its_cache_and_takes_of_memory_is_kept() -> None:
    told = iter([b'vllm:kv_cache_usage_perc{engine="0"} 0.25\n', b"# no number\n"])

    async def metrics(request: web.Request) -> web.Response:
        return web.Response(body=next(told, b""))

    async def run() -> Watch:
        async with serving("/metrics", metrics, "GET") as url:
            watch = Watch(os.getpid, f"{url}/metrics", lambda: 7)
            looking = asyncio.create_task(watch.run())
            while watch.cache_used < 0 or not watch.device_bytes:
                await asyncio.sleep(0.01)
            looking.cancel()
            return watch

    watch = asyncio.run(run())
    assert (watch.cache_used, watch.device_bytes) == (0.25, 7)
    assert watch.peak_bytes > 10 << 20
    watch.reset()
    assert (watch.cache_used, watch.device_bytes, watch.peak_bytes) == (-1.0, 0, 0)


def test_nobody_listens(tmp_path: Path) -> None:
    async def run() -> list[Outcome]:
        async with Remote(f"http://127.0.0.1:{free_port()}", "none") as remote:
            return await Client(remote).run(draw(SMALL, 64))

    assert {each.status for each in asyncio.run(run())} == {"refused"}


def test_a_server_that_nobody_has_started_is_not_asked(llmsys: Callable[..., Any], results: Path) -> None:
    """The run ends before its load, of which each request would have waited for an answer."""
    url = f"http://127.0.0.1:{free_port()}"
    done = llmsys("+exp=bench_serve_burst", "smoke=true", "server=openai", f"server.url={url}", "task.request_s=600")
    assert done.returncode == 1
    (path,) = results.rglob("record.json")
    record = json.loads(path.read_text())
    assert (record["status"], record["reason"]) == ("failed", "NotUp")
    assert f"server.url={url}: nobody listens there: " in record["error"]
    assert (path.parent / "requests.jsonl").read_text() == ""


SLEEPS = "import time; print('loading', flush=True); time.sleep(60)"


@pytest.mark.parametrize(
    ("command", "within_s", "why"),
    [
        ([sys.executable, "-c", "raise SystemExit('no such model')"], 30, "ended with code 1: no such model"),
        (["no-such-command"], 30, "ended with code 127: no-such-command: No such file"),
        ([sys.executable, "-c", SLEEPS], 3, "not healthy in 3 s: loading"),
    ],
)
def test_a_server_that_does_not_come_up_is_said_with_its_log(
    tmp_path: Path, command: list[str], within_s: float, why: str
) -> None:
    life = Life(command, tmp_path / "log")
    life.start()
    try:
        with pytest.raises(NotUp, match=why):
            asyncio.run(life.healthy(f"http://127.0.0.1:{free_port()}/health", within_s))
    finally:
        life.stop()


STARTER = """
import subprocess, sys, time
from pathlib import Path
from llmsys.bench.serve.life import Life
life = Life([sys.executable, "-c", {child!r}], Path({log!r}))
life.start()
time.sleep(60)
"""
CHILD = """
import os, subprocess, sys, time
below = subprocess.Popen(["sleep", "60"])
between = "import subprocess as s; print(s.Popen(['sleep', '60'], stdout=-3, stderr=-3, start_new_session=True).pid)"
away = subprocess.run([sys.executable, "-c", between], capture_output=True, text=True).stdout.strip()
print(os.getpid(), below.pid, away, flush=True)
time.sleep(60)
"""
"""The last one is in a session of its own, and whoever started it has ended."""


@pytest.mark.parametrize("how", [signal.SIGKILL, signal.SIGTERM])
def test_a_server_and_what_it_has_started_go_with_whoever_started_it(tmp_path: Path, how: signal.Signals) -> None:
    log = tmp_path / "log"
    starter = subprocess.Popen([sys.executable, "-c", STARTER.format(child=CHILD, log=str(log))])
    try:
        deadline = time.monotonic() + 30
        while not (log.exists() and log.read_text().count("\n")):
            assert time.monotonic() < deadline
            time.sleep(0.02)
        pids = [int(each) for each in log.read_text().split()]
    finally:
        os.kill(starter.pid, how)
        starter.wait()
    while any(Path(f"/proc/{pid}").exists() for pid in pids):
        assert time.monotonic() < deadline
        time.sleep(0.02)
