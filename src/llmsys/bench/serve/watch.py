"""What a server takes while it is under load: memory of its processes, and of its cache as far as it tells."""

from __future__ import annotations

import asyncio
import os
import re
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
    return total * os.sysconf("SC_PAGE_SIZE")


class Watch:
    """Looks twice a second: `pid()` of whom; `metrics`: where a server tells of itself, as Prometheus reads it;
    `device()`: bytes in use on the device. `looking()` is called each time."""

    def __init__(
        self,
        pid: Callable[[], int],
        metrics: str = "",
        device: Callable[[], int] = lambda: 0,
        looking: Callable[[], None] = lambda: None,
    ) -> None:
        self.pid, self.metrics, self.device, self.looking = pid, metrics, device, looking
        self.reset()

    def reset(self) -> None:
        """Forgets what was before."""
        self.peak_bytes = self.device_bytes = 0
        self.cache_used = -1.0
        """The most of its cache that a server says it has used, a share; -1: it says nothing."""

    async def run(self) -> None:
        """Until it is cancelled."""
        async with aiohttp.ClientSession(timeout=aiohttp.ClientTimeout(total=2)) as session:
            while True:
                self.looking()
                if pid := self.pid():
                    self.peak_bytes = max(self.peak_bytes, await asyncio.to_thread(resident, pid))
                self.device_bytes = max(self.device_bytes, self.device())
                if self.metrics:
                    try:
                        async with session.get(self.metrics) as answer:
                            found = CACHE.search(await answer.read())
                            self.metrics = self.metrics if answer.status == 200 else ""
                    except (aiohttp.ClientError, OSError, TimeoutError):
                        found = None  # of a server that tells nothing, or has died
                    if found:
                        self.cache_used = max(self.cache_used, float(found[1]))
                await asyncio.sleep(EACH_S)
