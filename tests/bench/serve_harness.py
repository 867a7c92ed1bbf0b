"""What tests of serving share: a stub that runs, and tasks."""

from __future__ import annotations

import contextlib
import json
import sys
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

from llmsys import compose, schema
from llmsys.bench.serve.life import Life, free_port
from llmsys.bench.serve.outcome import Outcome
from llmsys.bench.serve.pace import Pace
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


PASSES = {"prefill/1x8": 2.0, "prefill/1x32": 2.9, "decode/1x8": 1.0, "decode/1x32": 1.1, "decode/4x8": 1.5,
          "decode/4x32": 1.7}  # fmt: skip
"""What passes of `llama_tiny` took, ms."""


def passes_recorded(folder: Path, *words: str, **more: Any) -> Path:
    """A run of `bench_serve_modules` with these."""
    config = compose.compose(["task=bench_serve_modules", "model=llama_tiny", *words])
    summary = {"peak_tflops": 0.05, "peak_gbps": 20.0, "mem_gib": 1.0}
    model = schema.build(config).model
    assert isinstance(model, schema.Transformer)
    rooflines = Pace(model=model, flops_per_s=0.05e12, bytes_per_s=20e9)
    for key, took in PASSES.items():
        batch, context = map(int, key.partition("/")[2].split("x"))
        new, before = (context, 0) if key.startswith("prefill") else (1, context)
        summary |= {f"{key}/least_ms": rooflines.least_s(batch, new, before) * 1e3, f"{key}/ms": took}
    made = {
        "schema": 1,
        "name": "x",
        "run_id": "a",
        "status": "ok",
        "task": "bench_serve_modules",
        "config": config,
        "summary": summary,
        "env": {"device_name": "a machine"},
    }
    (folder / "record.json").write_text(json.dumps({**made, **more}))
    return folder / "record.json"
