"""Frames go in pieces, and lines are as slow as they are told."""

from __future__ import annotations

import asyncio
import os
import signal
import time
from pathlib import Path

import pytest
from decentral_running import job, losses_of, machines, mem_gib, training, undisturbed

from llmsys.decentral import pieces
from llmsys.decentral.coordinator import Coordinator
from llmsys.decentral.pieces import LAST, MORE, PIECE_BYTES, Direction, Joined
from llmsys.decentral.processes import Processes
from llmsys.decentral.serve import Serving
from llmsys.decentral.wire import FRAME_BYTES, Malformed


@pytest.mark.parametrize("size", [0, 1, PIECE_BYTES, PIECE_BYTES + 1, 3 * PIECE_BYTES + 7])
def test_what_is_taken_apart_is_put_together(size: int) -> None:
    data, joined = os.urandom(size), Joined()
    cut = [*pieces.pieces(data)]
    assert max(map(len, cut)) <= PIECE_BYTES + 1
    for _ in range(2):  # and the next frame after it
        found = [joined.add(each) for each in cut]
        assert found[:-1] == [None] * (len(cut) - 1)
        assert found[-1] == data


def test_what_is_too_large_is_refused_before_it_is_there() -> None:
    joined = Joined()
    for _ in range(FRAME_BYTES // PIECE_BYTES):
        assert joined.add(MORE + bytes(PIECE_BYTES)) is None
    with pytest.raises(Malformed, match="of a frame of"):
        joined.add(MORE + b"1")
    for wrong in (b"", b"\2abc"):
        with pytest.raises(Malformed):
            Joined().add(wrong)
    assert Joined().add(LAST) == b""


def test_a_line_carries_one_message_at_a_time() -> None:
    """8 Mbit/s are a megabyte a second, each way; what comes while it was being sent has come already."""
    up = Direction(8.0, 0.0)
    assert up.busy_until(1_000_000, now=0.0) == pytest.approx(1.0)
    assert up.busy_until(500_000, now=0.2) == pytest.approx(1.5)
    assert up.busy_until(500_000, now=9.0) == pytest.approx(9.5)
    down = Direction(8.0, 0.0)
    assert down.received_at(1_000_000, now=1.0) == pytest.approx(1.0)
    assert down.received_at(1_000_000, now=1.1) == pytest.approx(2.0)


@pytest.mark.slow
@pytest.mark.parametrize("direct", [False, True])
def test_a_slow_line_is_no_reason_to_be_given_up(tmp_path: Path, direct: bool) -> None:
    """State takes longer than three beats, and signs of life go between its pieces; a kill is mended all the same. So
    it is where what takes so long goes past the broker, who sees nothing of it."""
    steps, hit = 6, ""
    coordinator = Coordinator(job("llama"), training("llama", steps, copies=1))
    own = [
        each.__class__(**{**each.__dict__, "up_mbit": 1.0, "down_mbit": 4.0})
        for each in machines(mem_gib("llama", 2), 3)
    ]

    def committed(step: int) -> None:
        nonlocal hit
        if step == 3:
            hit = coordinator.owners[1]
            os.kill(processes.processes[hit].pid, signal.SIGKILL)

    with Processes(tmp_path, "slow", emulate=True, delay_ms=20, direct=direct) as processes:

        def ready(port: int) -> None:
            for each in own:
                processes.start(each, f"127.0.0.1:{port}")

        begin = time.monotonic()
        asyncio.run(asyncio.wait_for(Serving(coordinator, "slow", committed).run(ready=ready), 250))
        took = time.monotonic() - begin
    assert losses_of(coordinator) == undisturbed("llama", steps)
    assert coordinator.happened["Lost"] == 1
    assert coordinator.restarts.astray == 0
    assert took > 5.0  # it was slow, after all
    assert bool(coordinator.directory.carried) == direct
