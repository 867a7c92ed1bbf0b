"""A broker and providers in one process, by a virtual clock: the protocol that real ones speak, frame for frame.

For tests and for trying things: who is killed, stopped or comes when is up to whoever looks on (`watch`), and the same
faults give the same run.
"""

from __future__ import annotations

import collections
from collections.abc import Callable, Iterable

from llmsys.decentral import fleet
from llmsys.decentral.coordinator import Coordinator
from llmsys.decentral.planes import Plane
from llmsys.decentral.provider import Provider
from llmsys.decentral.wire import BROKER, encode

BEAT_S = 0.5
IDLE_S = 60.0
"""Nothing has happened for so long, and nothing will."""


class Stalled(RuntimeError):
    """Nobody has anything to do, and the job is not done."""


class Local:
    """`watch` is called with this after whatever happens: (name of the provider, kind of the frame that it was sent or
    `work`, step). `carry(to, data)`: what arrives of a frame that is sent."""

    def __init__(
        self,
        coordinator: Coordinator,
        watch: Callable[[Local, str, str, int], None] | None = None,
        carry: Callable[[str, bytes], Iterable[bytes]] = lambda to, data: (data,),
    ) -> None:
        self.coordinator, self.watch, self.carry = coordinator, watch, carry
        self.now = 0.0
        self.providers: dict[str, Provider] = {}
        self.machines: dict[str, tuple[fleet.Provider, str]] = {}
        self.inboxes: dict[str, collections.deque[bytes]] = {}
        self.frozen: set[str] = set()
        self._lives = 0

    # --- who is there ---

    def join(self, machine: fleet.Provider, plane: Plane) -> None:
        self._lives += 1
        self.providers[machine.name] = Provider(machine.name, plane)
        self.inboxes[machine.name] = collections.deque()
        self.machines[machine.name] = (machine, str(self._lives))
        self.coordinator.join(machine, str(self._lives), self.now)

    def rebuilt(self, coordinator: Coordinator) -> None:
        """Another broker in the place of the one that has died: what was on its way is lost, and all dial again."""
        self.coordinator = coordinator
        for name in self.providers:
            self.inboxes[name].clear()
            coordinator.join(*self.machines[name], self.now)

    def kill(self, name: str, *, noticed: bool = True) -> None:
        """`noticed`: its connection is closed, as that of a process that was killed; else it is just silent."""
        del self.providers[name], self.inboxes[name]
        self.frozen.discard(name)
        if noticed:
            self.coordinator.gone(name, self.now)

    def freeze(self, name: str) -> None:
        """As SIGSTOP does: what is sent to it waits."""
        self.frozen.add(name)

    def thaw(self, name: str) -> None:
        self.frozen.discard(name)

    def leave(self, name: str) -> None:
        """It says that it goes, and stays until it is let go."""
        provider = self.providers[name]
        provider.say_leave()
        self._collect(provider)

    # --- what happens ---

    def run(self) -> None:
        """Until the job is done. Stalled where it never will be."""
        busy_s = self.now
        while not self.coordinator.finished:
            if self.round():
                busy_s = self.now
            elif self.now > busy_s + IDLE_S:
                raise Stalled(f"nothing has happened since {busy_s:.1f} s; {self.coordinator.state.phase}")
            else:
                self.now += BEAT_S
                for name in [*self.providers]:
                    if name not in self.frozen:
                        self.coordinator.beat(name, self.now)

    def round(self) -> bool:
        """Everybody's turn; whether anything was done."""
        done = self._deliver()
        for name in [*self.providers]:
            if name in self.frozen or name not in self.providers:
                continue
            provider, inbox = self.providers[name], self.inboxes[name]
            while inbox and name in self.providers and name not in self.frozen:
                data = inbox.popleft()
                provider.hear(data)
                done = True
                self._collect(provider)
                self._seen(name, "heard", provider.says.step)
            if name in self.providers and name not in self.frozen and provider.work():
                done = True
                self._collect(provider)
                self._seen(name, "work", provider.says.step + 1)
            if name in self.providers and provider.stopped:
                self.kill(name)
        self.coordinator.tick(self.now)
        return self._deliver() or done

    def _seen(self, name: str, what: str, step: int) -> None:
        if self.watch:
            self.watch(self, name, what, step)

    def _collect(self, provider: Provider) -> None:
        """What it says reaches the broker."""
        said: list[bytes] = []
        provider.tell(lambda frame: said.append(encode(frame)))
        for each in said:
            for data in self.carry(BROKER, each):
                self.coordinator.hear(provider.name, data, self.now)

    def _deliver(self) -> bool:
        self.coordinator.tick(self.now)
        said, self.coordinator.out = self.coordinator.out, []
        for name, data in said:
            if name in self.inboxes:
                self.inboxes[name].extend(self.carry(name, data))
        return bool(said)
