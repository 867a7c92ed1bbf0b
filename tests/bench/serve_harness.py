"""What tests of serving share: a stub that runs, and tasks."""

from __future__ import annotations

import contextlib
import sys
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

from llmsys import schema
from llmsys.bench.serve.life import Life, free_port
from llmsys.bench.serve.outcome import Outcome
from llmsys.bench.serve.remote import Remote


def task(**settings: Any) -> schema.Serve:
    return schema.Serve(**settings)


@contextlib.asynccontextmanager
async def stub(folder: Path, *words: str) -> AsyncIterator[tuple[Remote, Life]]:
    """A stub as a process, and who speaks to it."""
    port = free_port()
    command = [sys.executable, "-m", "llmsys.bench.serve.stub", f"--port={port}", *words]
    life = Life(command, folder / "server.log")
    life.start()
    try:
        await life.healthy(f"http://127.0.0.1:{port}/health", 30)
        async with Remote(f"http://127.0.0.1:{port}", "stub") as remote:
            yield remote, life
    finally:
        life.stop()


def outcome(
    index: int = 0, *, due: float = 0.0, sent: float = 0.0, tokens: tuple[float, ...] = (), **more: Any
) -> Outcome:
    end = tokens[-1] if tokens else sent
    given = {"input": 8, "wanted": len(tokens), "end_s": end, **more}
    return Outcome(index=index, due_s=due, sent_s=sent, token_s=list(tokens), **given)
