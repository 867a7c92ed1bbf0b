"""A storm over real processes: one after another is killed, stopped, woken, told to go or paused, others come, and the
broker's losses are those of one process that nothing happened to."""

from __future__ import annotations

import asyncio
import random
from collections import Counter
from pathlib import Path

import pytest
from decentral_running import job, losses_of, machines, mem_gib, training, undisturbed

from llmsys.decentral.coordinator import Coordinator
from llmsys.decentral.processes import Processes
from llmsys.decentral.serve import Serving

KINDS = ("SIGKILL", "SIGKILL", "SIGSTOP", "SIGTERM", "SIGUSR1")
LEAST, MOST = 3, 5


class Weather:
    """`count` faults, one each time that more than `LEAST` providers are there, at a moment that a seed gives; whoever
    goes is replaced, one that was stopped is woken when it has been given up, and one that was paused resumes."""

    def __init__(self, coordinator: Coordinator, processes: Processes, seed: int, count: int) -> None:
        self.coordinator, self.processes, self.count = coordinator, processes, count
        self.random = random.Random(seed)
        self.happened: Counter[str] = Counter()
        self.started = 0
        self.stopped: set[str] = set()
        self.paused: set[str] = set()

    def start(self, port: int) -> None:
        self.port = port
        for _ in range(MOST):
            self.another()

    def another(self) -> None:
        machine = machines(mem_gib("llama", 2), self.started + 1)[-1]
        self.started += 1
        self.processes.start(machine, f"127.0.0.1:{self.port}")

    @property
    def over(self) -> bool:
        return sum(self.happened.values()) >= self.count

    async def blow(self) -> None:
        """Until all has happened."""
        while not self.over:
            await asyncio.sleep(self.random.uniform(0.05, 0.4))
            there = sorted(self.coordinator.state.present - self.stopped - self.paused)
            for name in [*self.stopped, *self.paused]:
                if name not in self.coordinator.state.present:
                    self.processes.signal(name, "SIGCONT" if name in self.stopped else "SIGUSR2")
                    self.stopped.discard(name)
                    self.paused.discard(name)
            if len(there) <= LEAST or self.coordinator.state.step == 0:
                continue
            name, what = self.random.choice(there), self.random.choice(KINDS)
            self.processes.signal(name, what)
            self.happened[what] += 1
            if what == "SIGSTOP":
                self.stopped.add(name)
            elif what == "SIGUSR1":
                self.paused.add(name)
            else:
                self.another()


@pytest.mark.parametrize(
    ("seed", "count"), [(0, 10), pytest.param(1, 100, marks=[pytest.mark.slow, pytest.mark.timeout(1800)])]
)
def test_a_storm(tmp_path: Path, seed: int, count: int) -> None:
    steps = 100_000  # cut short once the storm is over
    coordinator = Coordinator(job("llama"), training("llama", steps))

    async def weather() -> Weather:
        with Processes(tmp_path / "providers", "storm") as processes:
            made = Weather(coordinator, processes, seed, count)
            serving = Serving(coordinator, "storm")
            running = asyncio.create_task(serving.run(ready=made.start))
            blowing = asyncio.create_task(made.blow())
            done, _ = await asyncio.wait([running, blowing], return_when=asyncio.FIRST_COMPLETED)
            for each in done:
                each.result()  # what went wrong
            last = coordinator.state.step + 3
            object.__setattr__(coordinator.training, "steps", last)
            await asyncio.wait_for(running, 60)
            for name in made.stopped:
                processes.signal(name, "SIGCONT")
        assert all(each.poll() is not None for each in processes.processes.values())
        return made

    made = asyncio.run(weather())
    found = losses_of(coordinator)
    assert made.over
    assert len(found) == coordinator.state.step >= count // 10
    assert found == undisturbed("llama", len(found))
    assert coordinator.happened["Committed"] == len(found)  # none twice
    assert coordinator.again <= sum(made.happened.values()) + coordinator.restarts.astray
