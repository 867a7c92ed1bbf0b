"""From a config to somebody who answers: a model in this process, or a server that is started and stopped."""

from __future__ import annotations

import asyncio
import contextlib
import os
import shlex
import sys
import tempfile
import time
from collections.abc import AsyncIterator, Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

from llmsys import schema
from llmsys.bench.serve import served, words, work
from llmsys.bench.serve.client import Server
from llmsys.bench.serve.life import Life, free_port, listening
from llmsys.bench.serve.predict import Batching
from llmsys.bench.serve.remote import TGI, Remote

if TYPE_CHECKING:
    from llmsys.context import Context

HOST = "127.0.0.1"
LOG = "server.log"


@dataclass(kw_only=True)
class Running:
    """Somebody who answers. `pid()`: of the process that takes the memory, 0 where it is not known; `metrics`: where it
    tells of itself; `ended()`: how it has ended, empty as long as it has not; `here`: it computes the
    run's model on the run's device; `batching`: how, where that is known."""

    server: Server
    pid: Callable[[], int]
    metrics: str = ""
    ended: Callable[[], str] = lambda: ""
    here: bool = False
    batching: Batching | None = None
    summary: dict[str, float] = field(default_factory=dict)
    notes: dict[str, str] = field(default_factory=dict)


@contextlib.asynccontextmanager
async def started(config: schema.Config, context: Context, longest: int) -> AsyncIterator[Running]:
    """Of `config.server`, for requests of at most `longest` tokens, in and out; gone with the block, however that is
    left. Raises ValueError for what cannot be served so, `life.NotUp` where a server does not come up."""
    own = config.server
    if isinstance(own, schema.InProcessServer):
        async with _in_process(config, own, context, longest) as running:
            yield running
    elif isinstance(own, schema.StubServer):
        async with stub(own, context, LOG) as running:
            yield running
    else:
        assert isinstance(own, schema.HttpServer)
        async with _remote(config, own, context) as running:
            yield running


@contextlib.asynccontextmanager
async def stub(own: schema.StubServer, context: Context, log: str) -> AsyncIterator[Running]:
    """The server that computes nothing; `log`: the name of its file."""
    port = free_port()
    command = [sys.executable, "-m", "llmsys.bench.serve.stub", f"--port={port}"]
    command += [f"--ttft-ms={own.ttft_ms}", f"--tpot-ms={own.tpot_ms}"]
    command += [f"--fault={each}" for each in own.faults]
    life, url = Life(command, context.out / log), f"http://{HOST}:{port}"
    async with _lives(life, context, f"{url}/health", 30.0) as ready_s, Remote(url, "stub") as remote:
        yield _of(life, remote, {"server_start_s": ready_s})


@contextlib.asynccontextmanager
async def _in_process(
    config: schema.Config, own: schema.InProcessServer, context: Context, longest: int
) -> AsyncIterator[Running]:
    from llmsys.bench.serve.in_process import TOKENS, Continuous, Static

    begun = time.perf_counter()
    model = served.load(config, context)
    static = own.batching == "static"
    with Static(model, own.max_batch) if static else Continuous(model, own.max_batch, own.page, longest) as server:
        took = time.perf_counter() - begun
        how = Batching(static=static, sequences=own.max_batch, tokens=max(TOKENS, longest))
        yield Running(server=server, pid=os.getpid, here=True, batching=how, summary={"server_start_s": took})


@contextlib.asynccontextmanager
async def _remote(config: schema.Config, own: schema.HttpServer, context: Context) -> AsyncIterator[Running]:
    kind = TGI if own.kind == "tgi" else Remote
    said = words.text if own.prompts == "text" or kind is TGI else None
    if own.url:
        await listening(own.url)
        async with kind(own.url, own.model or config.model.name, said, own.body) as remote:
            yield Running(server=remote, pid=lambda: 0, metrics=f"{own.url.rstrip('/')}/metrics")
        return
    with tempfile.TemporaryDirectory(dir=context.out, prefix="served-") as folder:
        async with _started(config, own, context, kind, said, Path(folder)) as running:
            yield running


@contextlib.asynccontextmanager
async def _started(
    config: schema.Config,
    own: schema.HttpServer,
    context: Context,
    kind: type[Remote],
    said: Callable[[Sequence[int]], str] | None,
    folder: Path,
) -> AsyncIterator[Running]:
    """By its own command, of the weights that are written into `folder`: they can be as large as a disk has room for,
    and are gone with the server."""
    await asyncio.to_thread(served.store, config, context, folder)
    port = free_port()
    known = {"python": own.python or sys.executable, "model": str(folder), "host": HOST, "port": str(port)}
    known["dtype"] = work.DTYPES[config.model.dtype]
    command = [_filled(word, known) for word in (*own.command, *own.arguments)]
    context.log.info("server: %s", shlex.join(command))
    life, url = Life(command, context.out / LOG, own.env), f"http://{HOST}:{port}"
    async with (
        _lives(life, context, url + own.health, own.start_s) as ready_s,
        kind(url, own.model or str(folder), said, own.body) as remote,
    ):
        running = _of(life, remote, {"server_start_s": ready_s})
        running.metrics, running.here = f"{url}/metrics", True
        if own.sequences and own.pass_tokens:
            running.batching = Batching(sequences=own.sequences, tokens=own.pass_tokens)
        running.notes["command"] = shlex.join([*own.command, *own.arguments])
        yield running


@contextlib.asynccontextmanager
async def _lives(life: Life, context: Context, health: str, within_s: float) -> AsyncIterator[float]:
    context.beat(phase="starting the server")
    life.start()
    try:
        yield await life.healthy(health, within_s, context.beat)
    finally:
        life.stop()


def _of(life: Life, server: Server, summary: dict[str, float]) -> Running:
    assert life.process is not None

    def ended() -> str:
        return "" if life.ended is None else f"the server ended with code {life.ended}: {life.said()}"

    process = life.process
    return Running(server=server, pid=lambda: process.pid, ended=ended, summary=summary)


def _filled(word: str, known: dict[str, str]) -> str:
    for key, value in known.items():
        word = word.replace("{" + key + "}", value)
    return word
