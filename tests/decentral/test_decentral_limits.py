"""A provider gives no more than its owner lets it: memory, and time in which nobody else needs the machine."""

from __future__ import annotations

import asyncio
import os
import stat
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
from decentral_running import job, losses_of, machines, mem_gib, training, undisturbed

from llmsys.decentral import limits
from llmsys.decentral.coordinator import Coordinator
from llmsys.decentral.limits import Limits
from llmsys.decentral.processes import Processes
from llmsys.decentral.serve import Serving

TOKEN = "for this test"


def run(tmp_path: Path, more: dict[str, list[str]], then: Callable[[Coordinator], object]) -> tuple[Coordinator, str]:
    """A job of three providers that goes on until `then`, an awaitable, is through, and what the first of them said."""
    coordinator = Coordinator(job("llama"), training("llama", 100_000))

    async def serve() -> None:
        with Processes(tmp_path / "providers", TOKEN) as processes:

            def ready(port: int) -> None:
                for each in machines(mem_gib("llama", 2), 3):
                    processes.start(each, f"127.0.0.1:{port}", more=more.get(each.name, []))

            running = asyncio.create_task(Serving(coordinator, TOKEN).run(ready=ready))
            done = asyncio.ensure_future(then(coordinator))  # type: ignore[call-overload]
            await asyncio.wait([running, done], timeout=90, return_when=asyncio.FIRST_COMPLETED)
            assert done.done(), coordinator.state.present
            done.result()
            object.__setattr__(coordinator.training, "steps", coordinator.state.step + 3)
            await asyncio.wait_for(running, 30)
        assert {each.returncode for each in processes.processes.values()} == {0}

    asyncio.run(serve())
    found = losses_of(coordinator)
    assert found == undisturbed("llama", len(found))
    assert coordinator.again == 0  # it handed over what it had
    return coordinator, (tmp_path / "providers" / "p0.log").read_text()


async def until(true: Callable[[], bool]) -> None:
    while not true():
        await asyncio.sleep(0.02)


@pytest.mark.slow
def test_one_that_has_taken_more_memory_than_it_may_leaves(tmp_path: Path) -> None:
    async def then(own: Coordinator) -> None:
        await until(lambda: own.happened["Left"] == 1)
        await until(lambda: own.state.phase == "computing")

    own, said = run(tmp_path, {"p0": ["--limit-gib", "0.01"]}, then)
    assert own.state.present == {"p1", "p2"}
    assert "p0 leaves: it has 0." in said


@pytest.mark.slow
def test_one_whose_owner_needs_the_machine_pauses_and_comes_again(tmp_path: Path) -> None:
    playing = tmp_path / "playing"

    async def then(own: Coordinator) -> None:
        await until(lambda: len(own.state.present) == 3 and own.state.step > 0)
        playing.touch()
        await until(lambda: own.state.present == {"p1", "p2"})
        await until(lambda: own.state.phase == "computing")
        playing.unlink()
        await until(lambda: len(own.state.present) == 3)

    _, said = run(tmp_path, {"p0": ["--pause-while", f"test -e {playing}"]}, then)
    assert "p0 pauses: the machine is needed\np0 comes again" in said


def test_it_comes_again_only_once_nobody_has_needed_the_machine_for_a_while() -> None:
    said: list[str] = []
    answers = iter([False, True, True, False, False, True, False, False, False, False])
    own = Limits(
        0.0,
        lambda: next(answers),
        lambda why: None,
        lambda: said.append("leaves"),
        lambda: said.append("pauses"),
        lambda: said.append("resumes"),
    )
    for _ in range(9):
        own.look()
    assert said == ["pauses", "resumes"]


def test_a_gpu_is_needed_where_another_process_computes_on_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A stand-in for the driver's program, which machines without a GPU do not have."""
    program = tmp_path / "nvidia-smi"
    monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")

    def says(*lines: object) -> None:
        program.write_text("#!/bin/sh\n" + "".join(f"echo {line}\n" for line in lines))
        program.chmod(program.stat().st_mode | stat.S_IXUSR)

    says()
    assert not limits.others_compute()
    says(os.getpid())
    assert not limits.others_compute()
    says(os.getpid(), os.getppid())
    assert limits.others_compute()
    says("No devices were found")
    assert not limits.others_compute()


def test_memory_that_is_taken_is_seen() -> None:
    before = limits.resident_gib()
    taken = bytearray(os.urandom(1 << 20) * 128)
    assert limits.resident_gib() - before == pytest.approx(0.125, rel=0.2)
    del taken


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["--pause-while", "there-is-none -x"], "there-is-none -x: there is no there-is-none here"),
        (["--yield-gpu"], "--yield-gpu: there is no nvidia-smi here"),
        (["--device", "cuda:97"], "device=cuda:97: torch does not have it here"),
        (["--device", "cuda", "--plane", "onnx"], "device=cuda: the onnx plane computes on the CPU"),
    ],
)
def test_a_mistake_is_one_line(tmp_path: Path, words: list[str], said: str) -> None:
    (tmp_path / "token").write_text(TOKEN)
    own = ["--join", "127.0.0.1:1", "--tflops", "1", "--mem-gib", "1", "--token-file", str(tmp_path / "token")]
    command = [sys.executable, "-m", "llmsys.decentral", "provider", *own, *words]
    done = subprocess.run(
        command, capture_output=True, text=True, timeout=60, env={**os.environ, "PATH": "/usr/bin:/bin"}
    )
    assert done.returncode == 1
    (line,) = done.stderr.strip().splitlines()
    assert said in line
