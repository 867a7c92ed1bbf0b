"""A broker as a process: a `Coordinator` with a hub, a clock, and a log from which it is rebuilt."""

from __future__ import annotations

import asyncio
import collections
import time
from collections.abc import Callable
from typing import Any

from llmsys.decentral.coordinator import Coordinator
from llmsys.decentral.fleet import Provider as Machine
from llmsys.decentral.hub import Hub
from llmsys.decentral.link import Credentials
from llmsys.decentral.reach import Reach
from llmsys.decentral.status import status
from llmsys.decentral.whereabouts import JobLost

LOOK_S = 0.1
"""Between two looks at the clock, while nobody says anything."""
AWAY_S = 0.75
"""A broker that has not looked for so long was busy or stopped itself, and has not heard those who were not silent."""


class Serving:
    """`coordinator` at work. `committed(step)` is called after each step, `looking()` all the time; tokens as of
    `Hub`."""

    def __init__(
        self,
        coordinator: Coordinator,
        token: str,
        committed: Callable[[int], None] = lambda step: None,
        looking: Callable[[], None] = lambda: None,
        trusted_token: str = "",
    ) -> None:
        self.coordinator, self.committed, self.looking = coordinator, committed, looking
        self.hub = Hub(token, self._joined, self._heard, self._closed, self._alive, self.status, trusted_token)
        self.hub.trusted |= {each.name for each in coordinator.state.providers if each.trusted and trusted_token}
        self._begun = time.monotonic() - coordinator.begun_s
        self._looked = self.now
        self._step = coordinator.state.step
        self._over = asyncio.Event()
        self._error: BaseException | None = None

    async def run(self, host: str = "127.0.0.1", port: int = 0, credentials: Credentials | None = None,
                  ready: Callable[[int], None] = lambda port: None) -> None:  # fmt: skip
        """Until the job is done; `ready(port)` once it listens. Raises what ends the job (`JobLost`)."""
        await self.hub.listen(host, port, credentials)
        ready(self.hub.port)
        try:
            while not self._over.is_set():
                self._look()
                self.looking()
                try:
                    await asyncio.wait_for(self._over.wait(), LOOK_S)
                except TimeoutError:
                    continue
        except JobLost as error:  # of what is looked at here: raised below, once all are let go
            self._error = error
        finally:
            if self.coordinator.finished or isinstance(self._error, JobLost):
                for name in [*self.hub.queues]:
                    self.coordinator.dismiss(name)
            self._send()  # whoever is not let go dials again, for a while: the broker may be started again
            await asyncio.sleep(0)
            await self.hub.close()
        if self._error is not None:
            raise self._error

    def status(self) -> dict[str, Any]:
        """See `llmsys.decentral.status`."""
        return status(self.coordinator, self.now)

    @property
    def sent(self) -> collections.Counter[str]:
        """Bytes, by provider: to the broker, and past it, as their peers say."""
        return self.hub.received + self.coordinator.directory.carried

    @property
    def now(self) -> float:
        return time.monotonic() - self._begun

    def _joined(self, machine: Machine, life: str, reach: Reach | None) -> None:
        self._guarded(lambda: self.coordinator.join(machine, life, self.now, reach))

    def _heard(self, name: str, data: bytes) -> None:
        self._guarded(lambda: self.coordinator.hear(name, data, self.now))

    def _alive(self, name: str) -> None:
        self.coordinator.beat(name, self.now, busy=True)

    def _closed(self, name: str) -> None:
        if not self._over.is_set():  # after it whoever was let go hangs up
            self._guarded(lambda: self.coordinator.gone(name, self.now))

    def _guarded(self, what: Callable[[], None]) -> None:
        """What goes wrong here (`JobLost`, a full disk) is the broker's end, and not that of whoever was just heard."""
        try:
            what()
            self._look()
        except Exception as error:  # noqa: BLE001  it is raised by `run`
            self._error = error
            self._over.set()

    def _look(self) -> None:
        """What follows; and everybody is told."""
        if self._over.is_set():
            return
        if self.now > self._looked + AWAY_S:
            self.coordinator.paused(self.now)
        self._looked = self.now
        if any(not each.empty() for each in self.hub.queues.values()):
            self.coordinator.moved(self.now)  # a line is slow, and nothing astray
        self.coordinator.tick(self.now)
        self._send()
        for step in range(self._step + 1, self.coordinator.state.step + 1):
            self._step = step
            self.committed(step)
        if self.coordinator.finished:
            self._over.set()

    def _send(self) -> None:
        self.coordinator.journal.noted()
        said, self.coordinator.out = self.coordinator.out, []
        for name, data in said:
            self.hub.send(name, data)
