"""Whoever dials in is measured, and told apart: what they hold together, and when one of them alone is faster."""

from __future__ import annotations

import asyncio
import dataclasses
import json
import subprocess
import sys
from pathlib import Path

import pytest

from llmsys import compose, schema
from llmsys.decentral import fleet_file, measure, probe_report
from llmsys.decentral.fleet import Provider
from llmsys.decentral.link import Line, provide
from llmsys.decentral.planes import plane_of
from llmsys.decentral.probe import Measured, Probe
from llmsys.decentral.processes import Processes
from llmsys.decentral.provider import Provider as Work

TOKEN = "for this test"
COMMAND = [sys.executable, "-m", "llmsys.decentral", "probe"]


def machine(name: str, **more: float) -> Provider:
    given = {"tflops": 0.1, "mem_gib": 8.0, "up_mbit": 16.0, "down_mbit": 64.0, **more}
    return Provider(name=name, **given)


def measured(name: str, mem_gib: float, mbit: float, tflops: float = 1.0) -> Measured:
    own = machine(name, mem_gib=mem_gib)
    return Measured(
        machine=own, rtt_ms=2.0, up_mbit=mbit, down_mbit=mbit, tflops=tflops, few_tflops=tflops / 8, free_gib=64.0
    )


def model(name: str) -> schema.Model:
    return schema.build(compose.compose(["+exp=decentral_plan", f"model={name}", "train.length=256"])).model


@pytest.mark.slow
def test_lines_are_measured_as_they_are_and_so_is_the_device(tmp_path: Path) -> None:
    """Real processes behind lines that are made slow; the one that is stopped when it is asked is left out."""
    own = [machine("fast"), machine("slow", up_mbit=4.0, down_mbit=16.0), machine("stopped")]
    said: list[str] = []

    async def serve() -> list[Measured]:
        probe = Probe(TOKEN, 1, said.append)
        with Processes(tmp_path, TOKEN, emulate=True, delay_ms=10.0) as processes:

            def ready(port: int) -> None:
                for each in own:
                    processes.start(each, f"127.0.0.1:{port}")

            running = asyncio.create_task(probe.run("127.0.0.1", 0, 3, 60.0, ready=ready))
            while "fast" not in probe.hub.received or probe.hub.received["fast"] < 10_000:
                assert not running.done(), running.result()
                await asyncio.sleep(0.01)
            processes.processes["stopped"].kill()
            return await running

    found = {each.machine.name: each for each in asyncio.run(asyncio.wait_for(serve(), 120))}
    assert set(found) == {"fast", "slow"}
    assert [each for each in said if "left out" in each] == ["stopped: left out: has gone"]
    assert found["fast"].up_mbit == pytest.approx(16, rel=0.25)
    assert found["fast"].down_mbit == pytest.approx(64, rel=0.25)
    assert found["slow"].up_mbit == pytest.approx(4, rel=0.25)
    assert found["slow"].down_mbit == pytest.approx(16, rel=0.25)
    assert 10.0 <= found["slow"].rtt_ms < 60.0
    assert found["slow"].few_tflops < found["slow"].tflops < 10


@pytest.mark.slow
def test_what_no_machine_holds_some_hold_together() -> None:
    own = [measured("a", 0.3, 1000.0), measured("b", 0.3, 1000.0)]
    (training, generation) = probe_report.predictions(own, model("llama_85m"), 1, 256)
    assert training.verdict == "does not fit"  # 85 M parameters with gradients and AdamW's moments: 1.3 GiB
    assert not training.together
    assert generation.alone_per_s > 0  # weights alone
    more = [measured(name, 0.5, 1000.0) for name in "abcd"]
    training = probe_report.predictions(more, model("llama_85m"), 1, 256)[0]
    assert training.verdict == "together only"
    assert len(training.together) >= 3


def test_one_alone_is_faster_where_lines_are_slow_and_not_where_they_are_fast() -> None:
    slow = probe_report.predictions([measured("a", 8, 1.0), measured("b", 8, 1.0, 0.9)], model("llama_85m"), 1, 256)[0]
    assert slow.verdict == "a alone is faster"
    fast = [measured("a", 8, 1e5), measured("b", 8, 1e5, 0.9)]
    found = probe_report.predictions(fast, model("llama_85m"), 1, 256)[0]
    assert found.verdict.startswith("together, 1.")
    assert set(found.together) == {"a", "b"}


def test_the_file_of_what_was_measured_is_a_fleet(tmp_path: Path) -> None:
    own = [measured("a", 8, 20.0), measured("b", 100, 5.0, 0.5)]
    path = tmp_path / "fleet.yaml"
    path.write_text(probe_report.fleet_text(own))
    found = fleet_file.read(path)
    assert [each.name for each in found.providers] == ["a", "b"]
    assert found.providers[1].mem_gib == 64.0  # of 100 that it offers, those that are free
    assert found.other.delay_ms == 2.0
    assert found == probe_report.fleet(own)


@pytest.mark.parametrize("body", [{"bytes": 1 << 40}, {"matmul": [1, 1 << 20]}, {"bytes": -1}, {}])
def test_nobody_is_measured_to_death(body: dict[str, object]) -> None:
    with pytest.raises((ValueError, KeyError)):
        measure.answer({"id": 1, **body}, plane_of("torch"))


def test_who_refuses_is_left_out_and_where_nobody_is_left_that_is_said() -> None:
    """A provider whose device fails."""

    async def serve() -> None:
        probe = Probe(TOKEN, 1, said.append)

        def ready(port: int) -> None:
            plane = plane_of("torch")
            plane.matmul_s = lambda rows, size: 1 / 0  # type: ignore[method-assign]
            own = Work("a", plane)
            line = Line(f"127.0.0.1:{port}", TOKEN, machine("a"), "1", None)
            working.append(asyncio.get_running_loop().run_in_executor(None, provide, own, line))

        try:
            await probe.run("127.0.0.1", 0, 1, 30.0, ready=ready)
        finally:
            for each in working:
                with pytest.raises(ConnectionError, match="the broker has gone"):
                    await each

    said: list[str] = []
    working: list[asyncio.Future[None]] = []
    with pytest.raises(ConnectionError, match="no provider came in 30 s that answers"):
        asyncio.run(asyncio.wait_for(serve(), 60))
    assert said == ["a: has come", "a: left out: measure: ZeroDivisionError: division by zero"]


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["--models", "llama_6"], "--models llama_6: must be of "),
        *(
            pytest.param(*each, marks=pytest.mark.slow)
            for each in (
                (["--listen", "7077"], "--listen 7077: must be HOST:PORT"),
                (["--providers", "0"], "must be 1 or more"),
                (["--wait", "0.2", "--listen", "127.0.0.1:0"], "no provider came in 0.2 s"),
            )
        ),
    ],
)
def test_a_mistake_is_one_line(tmp_path: Path, words: list[str], said: str) -> None:
    (tmp_path / "token").write_text(TOKEN)
    done = subprocess.run(
        [*COMMAND, "--credentials", str(tmp_path), *words], capture_output=True, text=True, timeout=60
    )
    assert done.returncode == 1
    assert said in done.stderr.strip().splitlines()[-1]


@pytest.mark.slow
def test_the_command_says_it_as_json(tmp_path: Path) -> None:
    (tmp_path / "token").write_text(TOKEN)
    words = ["--providers", "1", "--listen", "127.0.0.1:0", "--models", "llama_6m", "--length", "64", "--json"]
    asking = subprocess.Popen(
        [*COMMAND, "--credentials", str(tmp_path), *words], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )
    try:
        assert asking.stderr is not None
        port = asking.stderr.readline().rpartition(":")[2].strip()
        with Processes(tmp_path / "providers", TOKEN) as processes:
            processes.start(dataclasses.replace(machine("a"), mem_gib=4.0), f"127.0.0.1:{port}")
            text, _ = asking.communicate(timeout=120)
            processes.signal("a", "SIGKILL")
    finally:
        asking.kill()
        asking.wait()
    found = json.loads(text)
    assert found["providers"]["a"]["tflops"] > 0
    assert [each["what"] for each in found["predictions"]] == ["training", "generation"]
    assert all(each["verdict"] == "a alone is faster" for each in found["predictions"])
