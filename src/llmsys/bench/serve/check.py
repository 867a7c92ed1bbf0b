"""What our own client adds to a load, measured before the load: the same arrivals and prompts, as many as a few seconds
take, against the stub, whose times are known."""

from __future__ import annotations

import dataclasses
import math
import os
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from llmsys import schema
from llmsys.bench.serve import figures, servers
from llmsys.bench.serve.client import Client
from llmsys.bench.serve.load import Request

if TYPE_CHECKING:
    from llmsys.context import Context

MOST, TOKENS, SECONDS = 200, 8, 4.0
KEYS = ("added_ms_p50", "added_ms_p99", "lag_ms_p99")


async def client(task: schema.Serve, load: Sequence[Request], context: Context) -> dict[str, float]:
    """`client/<key>` for `KEYS`; without those of a lag where requests have no time of their own."""
    some = [each for each in load[:MOST] if math.isnan(each.due_s) or each.due_s <= load[0].due_s + SECONDS]
    short = [dataclasses.replace(each, new=min(each.new, TOKENS)) for each in some]
    stub = schema.StubServer(kind="stub", name="stub")
    with Path(os.devnull).open("w", encoding="utf-8") as file:
        async with servers.stub(stub, context, "client.log") as running:
            for _ in range(2):  # the first one opens its lines
                how: dict[str, Any] = {"ended": lambda each: each.left(file, 0), "request_s": 60.0}
                outcomes = await Client(running.server, most=task.concurrency, **how).run(short)
    found = figures.of(outcomes, task)
    return {f"client/{key}": found[key] for key in KEYS if key in found}
