"""A job whose providers talk to each other past the broker: processes, real sockets, and signals."""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
from collections.abc import Callable
from pathlib import Path

import pytest
from decentral_running import job, losses_of, machines, mem_gib, training, undisturbed

from llmsys.comm.place import listen
from llmsys.decentral.coordinator import Coordinator
from llmsys.decentral.event_log import EventLog
from llmsys.decentral.processes import Processes
from llmsys.decentral.serve import Serving

TOKEN = "for this test"
MORE = 6
"""Steps, once what is awaited has happened."""


class Watched:
    """A job of three providers, two of whom hold it, that goes on until `true(itself)` and then for a few steps."""

    def __init__(self, folder: Path, true: Callable[[Watched], bool]) -> None:
        self.folder, self.true = folder, true
        self.coordinator = Coordinator(job("llama"), training("llama", 100_000))
        self.serving = Serving(self.coordinator, TOKEN, self._committed)
        self.processes = Processes(folder / "providers", TOKEN, direct=True)
        self.marked: dict[str, int] = {}  # counters when it had happened
        self.more: dict[str, list[str]] = {}

    def _committed(self, step: int) -> None:
        if not self.marked and self.true(self):
            self.marked = dict(self.coordinator.counters)
            object.__setattr__(self.coordinator.training, "steps", step + MORE)

    def run(self) -> None:
        def ready(port: int) -> None:
            for each in machines(mem_gib("llama", 2), 3):
                self.processes.start(each, f"127.0.0.1:{port}", more=self.more.get(each.name, ()))

        with self.processes, contextlib.closing(EventLog(self.folder / "events.jsonl")) as log:
            self.coordinator.journal.note, self.coordinator.journal.noted = log.note, log.sync
            asyncio.run(asyncio.wait_for(self.serving.run(ready=ready), 120))
        found = losses_of(self.coordinator)
        assert found == undisturbed("llama", len(found))

    def lines(self) -> dict[str, set[str]]:
        """Of those who are there, whom they reach past the broker."""
        own = self.coordinator
        return {name: {*own.directory.said[name].direct} for name in own.state.present & own.directory.said.keys()}

    def all_up(self) -> bool:
        """Every owner reaches every other, and whoever keeps its copies."""
        own, lines = self.coordinator, self.lines()
        keepers = {name: {*keep} & own.state.present for name, keep in own.recovery.copies.keepers.items()}
        others = {name: ({*own.owners} - {name}) | keepers[name] for name in own.owners}
        return len(own.state.present) == 3 and all(each <= lines.get(name, set()) for name, each in others.items())

    def logs(self) -> str:
        return "".join(path.read_text() for path in sorted((self.folder / "providers").glob("*.log")))


@pytest.mark.slow
def test_no_frame_goes_by_the_broker_once_lines_are_up_and_nobody_is_told_a_secret(tmp_path: Path) -> None:
    """Neither the log of events, nor the status, nor what providers print has what lets somebody in."""
    told = []

    def true(own: Watched) -> bool:
        told.append(json.dumps(own.serving.status()))
        return own.all_up()

    own = Watched(tmp_path, true)
    own.run()
    coordinator = own.coordinator
    assert coordinator.counters["relayed"] == own.marked["relayed"]
    assert coordinator.again == coordinator.restarts.astray == 0
    last = own.serving.status()["providers"]
    for name in coordinator.owners:
        assert 0 < last[name]["direct_mib"] < last[name]["sent_mib"]
    shown = "".join([*told, json.dumps(last), (tmp_path / "events.jsonl").read_text(), own.logs()])
    assert "direct_mib" in shown
    assert len(coordinator.directory.reaches) == 3
    for reach in coordinator.directory.reaches.values():
        secrets = [reach.secret, *(reach.of(name).secret for name in coordinator.directory.reaches)]
        assert not any(secret in shown for secret in secrets)


@pytest.mark.slow
@pytest.mark.parametrize("what", ["SIGKILL", "SIGSTOP"])
def test_an_owner_that_is_hit_in_mid_step_costs_no_step(tmp_path: Path, what: str) -> None:
    """What it had been sent past the broker its neighbours still have."""
    hit = []

    def true(own: Watched) -> bool:
        if own.all_up():
            hit.append(own.coordinator.owners[-1])
            own.processes.signal(hit[0], what)
        return bool(hit)

    own = Watched(tmp_path, true)
    own.run()
    assert hit[0] not in own.coordinator.owners
    assert own.coordinator.again <= 1
    assert own.coordinator.happened["Lost"] == 1
    assert own.coordinator.restarts.astray == 0


@pytest.mark.slow
def test_one_that_cannot_be_reached_is_sent_everything_by_the_broker(tmp_path: Path) -> None:
    """Nobody answers where it says that it listens."""
    mute = "p1"

    def true(own: Watched) -> bool:
        said, others = own.coordinator.directory.said, [n for n in own.coordinator.owners if n != mute]
        return all(name in said and "no answer within" in said[name].relayed.get(mute, "") for name in others)

    silent, port = listen("127.0.0.1")
    own = Watched(tmp_path, true)
    own.more = {mute: ["--direct-as", f"127.0.0.1:{port}"]}
    own.run()
    os.close(silent)
    status = own.serving.status()["providers"]
    assert any("no answer within" in each["relayed"].get(mute, "") for each in status.values())
    assert f"{mute} at 127.0.0.1:{port}: by way of the broker: no answer within" in own.logs()
    assert own.coordinator.counters["relayed"] > own.marked["relayed"]
