"""What a server takes while it is under load: memory of its processes, and of its cache as far as it tells."""

from __future__ import annotations

import asyncio
import re
import time
from collections.abc import Callable
from pathlib import Path

import aiohttp

from llmsys.dispatch.child import descendants

EACH_S = 0.5
CACHE = re.compile(rb"^(?:vllm:(?:gpu|kv)_cache_usage_perc|sglang:token_usage)\S*\s+([0-9.eE+-]+)", re.MULTILINE)


def resident(pid: int) -> int:
    """Bytes of a process and all below it that lie in memory; 0 where there is no /proc."""
    total = 0
    for each in (pid, *descendants(pid)):
        try:
            total += int(Path(f"/proc/{each}/statm").read_text().split()[1])
        except (OSError, IndexError, ValueError):
            continue  # ended meanwhile, or no Linux
    return total * 4096


class Watch:
    """Looks twice a second: `pid()` of whom; `metrics`: where a server tells of itself, as Prometheus reads it.
    `looking()` is called each time."""

    def __init__(self, pid: Callable[[], int], metrics: str = "", looking: Callable[[], None] = lambda: None) -> None:
        self.pid, self.metrics, self.looking = pid, metrics, looking
        self.peak_bytes = 0
        self.cache: list[tuple[float, float]] = []
        """Share of the cache that is used, at such a time."""

    async def run(self) -> None:
        """Until it is cancelled."""
        begun = time.perf_counter()
        async with aiohttp.ClientSession(timeout=aiohttp.ClientTimeout(total=2)) as session:
            while True:
                self.looking()
                if pid := self.pid():
                    self.peak_bytes = max(self.peak_bytes, await asyncio.to_thread(resident, pid))
                if self.metrics:
                    try:
                        async with session.get(self.metrics) as answer:
                            found = CACHE.search(await answer.read())
                            self.metrics = self.metrics if answer.status == 200 else ""
                    except (aiohttp.ClientError, OSError, TimeoutError):
                        found = None  # of a server that tells nothing, or has died
                    if found:
                        self.cache.append((time.perf_counter() - begun, float(found[1])))
                await asyncio.sleep(EACH_S)
