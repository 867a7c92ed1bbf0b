"""Real processes over real sockets: a broker here, providers by their own command, and signals."""

from __future__ import annotations

import asyncio
import contextlib
import dataclasses
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
from decentral_broker import rebuilt
from decentral_running import job, losses_of, machines, mem_gib, training, undisturbed

import alone
from llmsys.decentral.coordinator import Coordinator
from llmsys.decentral.cut import Stage
from llmsys.decentral.exports import Exports
from llmsys.decentral.fleet import Provider as Machine
from llmsys.decentral.graph import Graph
from llmsys.decentral.hub import Hub, hello_of
from llmsys.decentral.link import Line, provide, stay
from llmsys.decentral.planes import Arrays, Rules
from llmsys.decentral.planes.torch_stage import TorchPlane, TorchStage
from llmsys.decentral.processes import Processes
from llmsys.decentral.provider import Provider
from llmsys.decentral.serve import Serving
from llmsys.decentral.whereabouts import JobLost
from llmsys.decentral.wire import BROKER, Array, Frame, Malformed, encode, header

STEPS = 8
TOKEN = "for this test"


class Machines:
    """Provider processes, none of which outlives the test."""

    def __init__(self, folder: Path) -> None:
        self.token = folder / "token"
        self.token.write_text(TOKEN)
        self.processes: dict[str, subprocess.Popen[str]] = {}

    def start(
        self, machine: Machine, port: int, *more: str, token: Path | None = None, python: Path | str = sys.executable
    ) -> subprocess.Popen[str]:
        words = ["--join", f"127.0.0.1:{port}", "--token-file", str(token or self.token), "--name", machine.name]
        words += ["--tflops", str(machine.tflops), "--mem-gib", str(machine.mem_gib)]
        words += ["--up-mbit", "500", "--down-mbit", "500", "--plane", machine.plane, *more]
        command = [str(python), "-m", "llmsys.decentral", "provider", *words]
        env = {**os.environ, "OMP_NUM_THREADS": "1"}
        made = subprocess.Popen(command, env=env, stderr=subprocess.PIPE, text=True)
        self.processes[machine.name] = made
        return made

    def end(self) -> None:
        for each in self.processes.values():
            each.kill()
            each.wait()
            if each.stderr is not None:
                each.stderr.close()


@pytest.fixture
def providers(tmp_path: Path) -> Iterator[Machines]:
    made = Machines(tmp_path)
    yield made
    made.end()


def run(coordinator: Coordinator, providers: Machines, count: int, committed: Callable[[int], None]) -> None:
    own = machines(mem_gib("llama", 2), count)

    def ready(port: int) -> None:
        for each in own:
            providers.start(each, port)

    asyncio.run(asyncio.wait_for(Serving(coordinator, TOKEN, committed).run(ready=ready), 60))


@pytest.mark.parametrize(
    ("what", "count"),
    [("SIGKILL", 3), *(pytest.param(*each, marks=pytest.mark.slow) for each in (("SIGSTOP", 3), ("SIGKILL", 4)))],
)
def test_a_signal_to_the_owner_of_a_stage(providers: Machines, what: str, count: int) -> None:
    """Killed, its stage is another's within a second (its connection is closed); stopped, after three beats that were
    not heard. Nobody is left behind, and the losses are those of one process."""
    coordinator = Coordinator(job("llama"), training("llama", STEPS))
    hit, at_s = "", dict[int, float]()

    def committed(step: int) -> None:
        nonlocal hit
        at_s[step] = time.monotonic()
        if step == 4:
            hit = coordinator.owners[0]
            os.kill(providers.processes[hit].pid, getattr(signal, what))

    run(coordinator, providers, count, committed)
    assert hit not in coordinator.owners
    assert losses_of(coordinator) == undisturbed("llama", STEPS)
    assert coordinator.again <= 1
    for name, process in providers.processes.items():
        if name != hit:
            assert process.wait(10) == 0, process.stderr


class Hangs(TorchPlane):
    """Computes until it hangs in the second micro-batch of a step, as a kernel may; `ended` ends that."""

    def __init__(self, step: int) -> None:
        super().__init__()
        self.step, self.ended = step, threading.Event()

    def stage(self, graph: Graph, stage: Stage, given: Arrays, rules: Rules) -> TorchStage:
        own, plane = super().stage(graph, stage, given, rules), self
        forward = own.forward

        def hang(step: int, micro_batch: int, inputs: Arrays, received: Arrays) -> dict[str, Array]:
            if (step, micro_batch) == (plane.step, 1):
                plane.ended.wait(60)
            return forward(step, micro_batch, inputs, received)

        own.forward = hang  # type: ignore[method-assign]
        return own


def test_who_computes_and_comes_to_no_end_is_as_good_as_gone(providers: Machines) -> None:
    """Its signs of life go on, from another thread. They say for how long it is at one thing."""
    coordinator = Coordinator(job("llama"), dataclasses.replace(training("llama", STEPS), hung_s=4.0))
    own, plane = machines(mem_gib("llama", 2), 3), Hangs(4)
    threads = []

    def ready(port: int) -> None:
        def live() -> None:
            line = Line(f"127.0.0.1:{port}", TOKEN, own[0], "1", None)
            with contextlib.suppress(ConnectionError):
                provide(Provider(own[0].name, plane), line)

        threads.append(threading.Thread(target=live))
        threads[0].start()
        for each in own[1:]:
            providers.start(each, port)

    try:
        asyncio.run(asyncio.wait_for(Serving(coordinator, TOKEN).run(ready=ready), 60))
    finally:
        plane.ended.set()
        threads[0].join()
    assert losses_of(coordinator) == undisturbed("llama", STEPS)
    assert own[0].name not in coordinator.owners
    assert any("at one thing for more than task.hung_s=4 s" in each for each in coordinator.refusals)


def test_a_provider_without_torch_beside_one_with(providers: Machines, tmp_path: Path) -> None:
    """Half the pipeline is computed by somebody who has numpy, onnxruntime, safetensors and grpcio, and what they
    require; the other half by torch."""
    python = alone.with_extra("provider", tmp_path / "bare")
    assert subprocess.run([python, "-c", "import torch"], capture_output=True, check=False).returncode != 0
    with ThreadPoolExecutor(1) as elsewhere:
        own = training("llama", STEPS)
        own = dataclasses.replace(own, exports=Exports(own.rules, elsewhere))
        coordinator = Coordinator(job("llama"), own)
        first, second = machines(mem_gib("llama", 2), 2)

        def ready(port: int) -> None:
            providers.start(first, port)
            providers.start(dataclasses.replace(second, plane="onnx"), port, python=python)

        asyncio.run(asyncio.wait_for(Serving(coordinator, TOKEN).run(ready=ready), 60))
    assert sorted(coordinator.owners) == [first.name, second.name]
    for found, expected in zip(losses_of(coordinator), undisturbed("llama", STEPS), strict=True):
        assert found == pytest.approx(expected, rel=1e-5)
    assert losses_of(coordinator) != undisturbed("llama", STEPS)  # other kernels: it was not torch after all
    assert coordinator.again == 0  # an export takes seconds, in which a broker goes on listening


@pytest.mark.slow
def test_a_broker_that_is_killed_and_started_again_loses_nothing(providers: Machines, tmp_path: Path) -> None:
    """Providers dial again for a while, and have what they had."""

    def start(port: int) -> None:
        for each in machines(mem_gib("llama", 2), 3):
            providers.start(each, port)

    found = rebuilt(tmp_path, TOKEN, "train", 40, start)
    assert [tuple(each) for each in found["losses"]] == undisturbed("llama", 40)
    assert found["again"] <= 1
    for process in providers.processes.values():
        assert process.wait(10) == 0


@pytest.mark.slow
def test_a_provider_with_another_token_is_not_let_in(providers: Machines, tmp_path: Path) -> None:
    wrong = tmp_path / "wrong"
    wrong.write_text("another")
    joined: list[object] = []

    async def serve() -> tuple[int, str]:
        hub = Hub(TOKEN, lambda *given: joined.append(given), lambda *given: None, lambda name: None)
        await hub.listen("127.0.0.1", 0)
        process = providers.start(machines(1.0, 1)[0], hub.port, token=wrong)
        try:
            _, said = await asyncio.to_thread(process.communicate)
        finally:
            await hub.close()
        return process.returncode, said

    code, said = asyncio.run(asyncio.wait_for(serve(), 60))
    assert code == 1
    assert said.strip().splitlines()[-1].endswith("the token is not this broker's")
    assert not joined


def test_only_who_shows_the_trusted_token_is_trusted(providers: Machines, tmp_path: Path) -> None:
    """Whatever they say of themselves, and by whatever name they come."""
    trusted = tmp_path / "trusted"
    trusted.write_text("shown to few")
    own = [dataclasses.replace(each, trusted=True) for each in machines(1.0, 2)]
    found: dict[str, bool] = {}

    async def serve() -> None:
        there = asyncio.Event()

        def joined(machine: Machine, life: str, reach: object) -> None:
            found[machine.name] = machine.trusted
            if len(found) == 2:
                there.set()

        hub = Hub(TOKEN, joined, lambda *given: None, lambda name: None, trusted_token="shown to few")
        await hub.listen("127.0.0.1", 0)
        providers.start(own[0], hub.port)
        providers.start(own[1], hub.port, token=trusted)
        await there.wait()
        await hub.close()

    asyncio.run(asyncio.wait_for(serve(), 60))
    assert found == {own[0].name: False, own[1].name: True}


@pytest.mark.parametrize("name", ["\ud800", "a" * 65, "[/x]\n", "", "ü"])
def test_a_name_that_cannot_be_shown_is_none(name: str) -> None:
    body = {"name": name, "tflops": 1.0, "mem_gib": 1.0, "up_mbit": 1.0, "down_mbit": 1.0, "life": "1"}
    said = Frame(kind="hello", sender=name, to="broker", body=body)
    with pytest.raises(Malformed):
        hello_of(encode(said))


@pytest.mark.parametrize(
    "given",
    [{"tflops": 10**400}, {"tflops": True}, {"tflops": 1e300}, {"up_mbit": 1e-310}, {"down_mbit": "5"},
     {"efficiency": 1e-320}, {"host_gib": None}, {"host_gbps": 10**400}, {"watts": 1e308}, {"mem_gib": [1]}],
)  # fmt: skip
def test_a_number_that_cannot_be_computed_with_is_none(given: dict[str, object]) -> None:
    """It would end the broker once it plans."""
    body = {"name": "p", "tflops": 1, "mem_gib": 1.0, "up_mbit": 1.0, "down_mbit": 1.0, "life": "1"}
    machine, *_ = hello_of(encode(Frame(kind="hello", sender="p", to="broker", body={**body, "watts": None})))
    assert type(machine.tflops) is float
    said = Frame(kind="hello", sender="p", to="broker", body={**body, **given})
    with pytest.raises(Malformed):
        hello_of(encode(said))


@pytest.mark.slow
def test_the_name_of_somebody_trusted_is_nobody_elses(providers: Machines, tmp_path: Path) -> None:
    """Who only shows the plain token is not sent what that one is."""
    trusted = tmp_path / "trusted"
    trusted.write_text("shown to few")
    own = machines(1.0, 1)[0]

    async def serve() -> tuple[int, str]:
        there = asyncio.Event()
        hub = Hub(TOKEN, lambda *given: there.set(), lambda *given: None, lambda name: None,
                  trusted_token="shown to few")  # fmt: skip
        await hub.listen("127.0.0.1", 0)
        providers.start(own, hub.port, token=trusted)
        await there.wait()
        there.clear()
        other = Machines(tmp_path)
        process = other.start(own, hub.port)
        try:
            _, said = await asyncio.to_thread(process.communicate)
        finally:
            other.end()
            await hub.close()
        assert not there.is_set()
        return process.returncode, said

    code, said = asyncio.run(asyncio.wait_for(serve(), 60))
    assert code == 1
    assert f"the name {own.name} is a trusted provider's" in said


def test_beyond_loopback_a_certificate_is_needed() -> None:
    hub = Hub(TOKEN, lambda *given: None, lambda *given: None, lambda name: None)
    with pytest.raises(ValueError, match=r"listen=0\.0\.0\.0: beyond loopback a certificate is needed"):
        asyncio.run(hub.listen("0.0.0.0", 0))


def test_one_that_waits_for_a_job_dials_a_broker_again_that_is_begun_again() -> None:
    """It has been told nothing yet, but was let in; of each reason it speaks once, however often it dials."""
    lives, said, dialled = list[str](), list[str](), list[Line]()
    own = machines(1.0, 1)[0]

    async def until(true: Callable[[], bool]) -> None:
        while not true():
            await asyncio.sleep(0.01)

    async def serve() -> None:
        hub = Hub(TOKEN, lambda machine, life, reach: lives.append(life), lambda *given: None, lambda name: None)
        await hub.listen("127.0.0.1", 0)
        port = hub.port

        def dial() -> Line:
            dialled.append(Line(f"127.0.0.1:{port}", TOKEN, own, "1", None))
            return dialled[-1]

        given = (Provider(own.name, TorchPlane()), dial, lambda: 60.0, said.append)
        there = asyncio.create_task(asyncio.to_thread(stay, *given))
        await until(lambda: bool(lives))
        await hub.close()
        await until(lambda: len(dialled) > 4)
        await hub.listen("127.0.0.1", port)
        await until(lambda: len(lives) > 1)
        hub.send(own.name, encode(Frame(kind="stop", sender=BROKER, to=own.name)))
        await there
        await hub.close()

    asyncio.run(asyncio.wait_for(serve(), 60))
    assert lives == ["1", "1"]
    assert said[0].endswith("the broker has gone")
    assert len(said) == len(set(said)) < len(dialled) - 1


def test_whoever_is_connected_is_let_go_where_looking_finds_that_the_job_is_lost() -> None:
    coordinator = Coordinator(dataclasses.replace(job("llama"), least=2), training("llama", 1))
    lines: list[Line] = []

    def looking() -> None:
        if coordinator.state.present:
            raise JobLost("nobody else will come")

    def ready(port: int) -> None:
        lines.append(Line(f"127.0.0.1:{port}", TOKEN, machines(1.0, 1)[0], "1", None))

    with pytest.raises(JobLost, match="nobody else will come"):
        asyncio.run(asyncio.wait_for(Serving(coordinator, TOKEN, looking=looking).run(ready=ready), 60))
    heard = [header(data)["kind"] for data in iter(lambda: lines[0].inbox.get(timeout=20), None)]
    assert heard == ["stop"]
    lines[0].close()


def test_a_provider_whose_broker_goes_ends_and_says_so(providers: Machines) -> None:
    async def serve() -> subprocess.Popen[str]:
        there = asyncio.Event()
        hub = Hub(TOKEN, lambda *given: there.set(), lambda *given: None, lambda name: None)
        await hub.listen("127.0.0.1", 0)
        process = providers.start(machines(1.0, 1)[0], hub.port, "--patience", "0.5")
        await there.wait()
        await hub.close()
        return process

    process = asyncio.run(asyncio.wait_for(serve(), 60))
    _, said = process.communicate(timeout=20)
    assert process.returncode == 1
    first, *_, last = [each for each in said.splitlines() if each.startswith("llmsys.decentral: 127.0.0.1:")]
    assert first.endswith(": the broker has gone; it dials again")
    assert not last.endswith("again")


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["--join", "127.0.0.1:1", "--tflops", "0", "--mem-gib", "1"], "tflops=0.0: must be a positive number"),
        (["--join", "127.0.0.1:1", "--tflops", "1", "--mem-gib", "1"], "127.0.0.1:1: "),
    ],
)
def test_a_mistake_is_one_line(providers: Machines, words: list[str], said: str) -> None:
    command = [sys.executable, "-m", "llmsys.decentral", "provider", "--token-file", str(providers.token), *words]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60)
    assert done.returncode == 1
    (line,) = done.stderr.strip().splitlines()
    assert said in line


@pytest.mark.slow
@pytest.mark.parametrize("direct", [False, True])
def test_one_that_is_told_to_go_hands_over_and_one_that_pauses_comes_again(tmp_path: Path, direct: bool) -> None:
    """SIGUSR1, SIGUSR2 and SIGTERM: no step under way is given up for any of them."""
    coordinator = Coordinator(job("llama"), training("llama", 100_000))
    own = machines(mem_gib("llama", 2), 3)

    async def signals(processes: Processes, running: asyncio.Task[None]) -> None:
        async def until(true: Callable[[], bool]) -> None:
            while not true():
                assert not running.done(), running.result()
                await asyncio.sleep(0.02)

        def there(count: int) -> Callable[[], bool]:
            return lambda: len(coordinator.state.present) == count and coordinator.state.phase == "computing"

        await until(there(3))
        first = coordinator.owners[0]
        processes.signal(first, "SIGUSR1")
        await until(there(2))
        processes.signal(first, "SIGUSR2")
        await until(there(3))
        processes.signal(coordinator.owners[-1], "SIGTERM")
        await until(there(2))
        object.__setattr__(coordinator.training, "steps", coordinator.state.step + 3)

    async def serve() -> None:
        with Processes(tmp_path / "providers", TOKEN, direct=direct) as processes:
            serving = Serving(coordinator, TOKEN)

            def ready(port: int) -> None:
                for each in own:
                    processes.start(each, f"127.0.0.1:{port}")

            running = asyncio.create_task(serving.run(ready=ready))
            await asyncio.wait_for(signals(processes, running), 60)
            await asyncio.wait_for(running, 30)
        assert {each.returncode for each in processes.processes.values()} == {0}

    asyncio.run(serve())
    found = losses_of(coordinator)
    assert found == undisturbed("llama", len(found))
    assert coordinator.again == 0
    assert coordinator.happened["Left"] == 2
    assert coordinator.happened["Joined"] == 4


def test_one_that_goes_before_the_job_has_begun_is_let_go_at_once(tmp_path: Path) -> None:
    waiting = dataclasses.replace(job("llama"), least=2)
    coordinator = Coordinator(waiting, training("llama", STEPS))

    async def serve() -> None:
        with Processes(tmp_path / "providers", TOKEN) as processes:
            own = machines(mem_gib("llama", 1), 1)[0]
            serving = Serving(coordinator, TOKEN)
            running = asyncio.create_task(serving.run(ready=lambda port: processes.start(own, f"127.0.0.1:{port}")))
            while not coordinator.state.present:
                await asyncio.sleep(0.02)
            processes.signal(own.name, "SIGTERM")
            assert await asyncio.wait_for(asyncio.to_thread(processes.processes[own.name].wait), 20) == 0
            running.cancel()
            await asyncio.wait([running])

    asyncio.run(serve())
    assert coordinator.happened["Left"] == 1
