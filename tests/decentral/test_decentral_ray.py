"""Providers on the nodes of a cluster: Ray starts them, and again; the broker is rebuilt from its log."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from llmsys.decentral import ray_runtime
from llmsys.decentral.event_log import last_step, read
from llmsys.decentral.fleet import Provider
from ray_cluster import Emulated, emulated

pytestmark = pytest.mark.slow
SMALL = (
    *("train.steps=30", "train.global_batch=4", "train.micro_batch=2", "train.length=32", "train.warmup_steps=1"),
    *("model.num_layers=2", "data.max_train=40", "data.max_val=2", "task.faults=[]", "task.stages=2"),
)
COMMAND = (sys.executable, "-m", "llmsys", "+exp=decentral_train", *SMALL)
PATIENT_S = 4.0
IMPATIENT = f"""
from llmsys.decentral import ray_runtime
from llmsys.main import main
ray_runtime.PATIENCE_S = {PATIENT_S}
main()
"""
"""As the command, in this very process."""
MACHINES = tuple(Provider(name=f"p{n}", tflops=1.0, mem_gib=1.0, up_mbit=100.0, down_mbit=100.0) for n in range(4))
NOBODY = "127.0.0.1:1"
OTHERS = {
    "decentral_finetune": (*SMALL, "model.weights=random"),
    "decentral_generate": (
        *("model.weights=random", "model.num_layers=2", "data.max_train=40", "data.max_val=2", "train.length=64"),
        *("task.new_tokens=40", "task.prompt_tokens=3", "task.streams=2", "task.stages=2", "task.faults=[]"),
    ),
}


@pytest.fixture(scope="module")
def cluster() -> Iterator[Emulated]:
    with emulated(1) as made:
        for number in range(4):
            made.cluster.add_node(num_cpus=2, resources={"provider": 1}, node_name=f"home{number}")
        made.cluster.wait_for_nodes()
        yield made


@pytest.fixture(scope="module")
def quiet(tmp_path_factory: pytest.TempPathFactory) -> list[float]:
    """Losses of processes that nothing happens to."""
    results = tmp_path_factory.mktemp("quiet")
    env = {**os.environ, "LLMSYS_RESULTS": str(results)}
    subprocess.run([*COMMAND, "task.providers=2"], env=env, check=True, timeout=120)
    found: list[float] = record(results)["samples"]["loss"]
    return found


def record(results: Path) -> dict[str, Any]:
    (path,) = results.glob("decentral_*/*/record.json")
    made: dict[str, Any] = json.loads(path.read_text())
    return made


@contextlib.contextmanager
def started(
    cluster: Emulated, results: Path, *words: str, command: tuple[str, ...] = COMMAND, after: int = 0
) -> Iterator[subprocess.Popen[bytes]]:
    """The command, from when so many steps are committed; no process of it is left."""
    env = {**os.environ, "LLMSYS_RESULTS": str(results), "RAY_ADDRESS": cluster.cluster.address}
    process = subprocess.Popen([*command, "task.start=ray", *words], env=env, start_new_session=True)
    try:
        while after and not any(last_step(read(path)) >= after for path in results.glob("*/*/events.jsonl")):
            assert process.poll() is None
            time.sleep(0.02)
        yield process
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()


@contextlib.contextmanager
def connected(cluster: Emulated) -> Iterator[Any]:
    """Ray, as a driver that ends with the block."""
    import ray

    ray.init(cluster.cluster.address, namespace=ray_runtime.NAMESPACE, log_to_driver=False)
    try:
        yield ray
    finally:
        ray.shutdown()


def kill_provider(cluster: Emulated, results: Path) -> None:
    """One that has a stage, by a signal to its actor's process."""
    (folder,) = results.glob("*/*")
    with connected(cluster) as ray:
        os.kill(ray.get(ray.get_actor(f"{folder.name}-p1").pid.remote()), signal.SIGKILL)


def until_free(cluster: Emulated, limit_s: float = ray_runtime.PATIENCE_S - 20) -> None:
    """No actor is left, and Ray gives away again all that the nodes have of the resource: before their usual patience
    has ended."""
    with connected(cluster) as ray:
        deadline = time.monotonic() + limit_s
        while (left := ray.util.list_named_actors()) or ray.available_resources().get("provider") != 4:
            assert time.monotonic() < deadline, (left, ray.available_resources())
            time.sleep(0.1)


@contextlib.contextmanager
def silent() -> Iterator[str]:
    """Where connections are accepted, and closed at the end of the block; who dials waits."""
    with socket.create_server(("127.0.0.1", 0)) as server:
        yield f"127.0.0.1:{server.getsockname()[1]}"


def test_a_broker_that_is_killed_goes_on_by_the_same_command(
    cluster: Emulated, results: Path, quiet: list[float]
) -> None:
    """Its providers, which Ray keeps, dial the same port again."""
    with started(cluster, results, after=8):
        pass
    with started(cluster, results) as process:
        assert process.wait(120) == 0
    made = record(results)
    assert made["samples"]["loss"] == quiet
    assert made["summary"]["steps"] == 30
    assert made["summary"]["joined"] == 4  # all by the broker that died
    (log,) = results.glob("*/*/log.txt")
    assert "going on after step" in log.read_text()


def test_a_provider_that_is_killed_is_started_again(cluster: Emulated, results: Path, quiet: list[float]) -> None:
    """By Ray, in another process, which joins as anybody does."""
    with started(cluster, results, after=5) as process:
        kill_provider(cluster, results)
        assert process.wait(120) == 0
    made = record(results)
    assert made["samples"]["loss"] == quiet
    assert made["summary"]["lost"] >= 1


def test_a_broker_that_ray_runs_is_begun_again_by_ray(cluster: Emulated, results: Path, quiet: list[float]) -> None:
    """Ray's worker, whose child it is, is killed; nobody gives the command again."""
    with started(cluster, results, *cluster.words, "dispatch.retries=1", after=8) as process:
        os.kill(worker(results), signal.SIGKILL)
        assert process.wait(180) == 0
    made = record(results)
    assert made["samples"]["loss"] == quiet
    (log,) = results.glob("*/*/log.txt")
    assert "going on after step" in log.read_text()


def worker(results: Path) -> int:
    """The parent of whoever has the events' log open, the broker."""
    (log,) = results.glob("*/*/events.jsonl")
    for folder in Path("/proc").glob("[0-9]*/fd"):
        try:
            if any(each.resolve() == log.resolve() for each in folder.iterdir()):
                return int((folder.parent / "stat").read_text().rpartition(")")[2].split()[1])
        except OSError:  # it has ended, or is another user's
            continue
    raise AssertionError(f"{log}: nobody has it open")


@pytest.mark.parametrize("exp", OTHERS)
def test_fine_tuning_and_generation_on_nodes_are_those_of_processes(
    cluster: Emulated, results: Path, tmp_path: Path, exp: str
) -> None:
    """Also where a provider is killed in between."""
    command = (sys.executable, "-m", "llmsys", f"+exp={exp}", *OTHERS[exp])
    alone = {**os.environ, "LLMSYS_RESULTS": str(tmp_path / "alone")}
    subprocess.run([*command, "task.providers=2", "task.reserve=0"], env=alone, check=True, timeout=120)
    with started(cluster, results, command=command, after=5) as process:
        kill_provider(cluster, results)
        assert process.wait(120) == 0
    expected, made = record(tmp_path / "alone"), record(results)
    assert made["summary"]["lost"] >= 1
    if exp == "decentral_generate":
        texts = [next(each.glob("*/*/generated.jsonl")).read_text() for each in (tmp_path / "alone", results)]
        assert texts[0] == texts[1]
    else:
        assert made["samples"]["loss"] == expected["samples"]["loss"]


def test_too_few_nodes_are_said_at_once(cluster: Emulated, results: Path) -> None:
    env = {**os.environ, "LLMSYS_RESULTS": str(results), "RAY_ADDRESS": cluster.cluster.address}
    done = subprocess.run([*COMMAND, "task.start=ray", "task.providers=9"], env=env, capture_output=True, text=True,
                          timeout=120, check=False)  # fmt: skip
    assert done.returncode == 1
    assert "task.providers=9: the cluster's nodes have 4 of the resource provider" in done.stdout + done.stderr


@pytest.mark.parametrize("words", [(), ("train.lr_by_method={full: 1e20}", "train.clip=0")], ids=["well", "error"])
def test_of_a_run_that_has_ended_nothing_is_left(cluster: Emulated, results: Path, words: tuple[str, ...]) -> None:
    """Neither where it ended well, nor of one that diverges."""
    with started(cluster, results, *words) as process:
        code = process.wait(120)
    (path,) = results.glob("decentral_*/*/record.json")
    made = json.loads(path.read_text())
    assert (code, made["status"], made["reason"]) == ((1, "failed", "nan") if words else (0, "ok", ""))
    until_free(cluster)


def test_providers_of_a_broker_that_is_dead_end_after_their_patience(cluster: Emulated, results: Path) -> None:
    command = (sys.executable, "-c", IMPATIENT, *COMMAND[3:], "dispatch=inline")
    with connected(cluster) as ray:
        with started(cluster, results, command=command, after=3):
            pass
        assert len(ray.util.list_named_actors()) == 4
    until_free(cluster)


def test_a_provider_that_ray_starts_again_for_nobody_ends(cluster: Emulated, monkeypatch: pytest.MonkeyPatch) -> None:
    """Where its process dies after its broker."""
    monkeypatch.setattr(ray_runtime, "PATIENCE_S", PATIENT_S)
    with silent() as address:
        with connected(cluster):
            nodes = ray_runtime.Nodes("run", "token", 1)
            nodes.start(MACHINES[0], address)
            pid = nodes.pid("p0")
        os.kill(pid, signal.SIGKILL)
        until_free(cluster)


def test_a_provider_whose_run_has_ended_says_why_and_ends(cluster: Emulated) -> None:
    with connected(cluster) as ray:
        nodes = ray_runtime.Nodes("run", "token", 4)
        for each in MACHINES:
            nodes.start(each, NOBODY)
        assert len(ray.wait([*nodes._runs.values()], num_returns=4, timeout=60)[0]) == 4
        assert nodes.wrong().keys() == {"p0", "p1", "p2", "p3"}
        assert all(f"ConnectionError: {NOBODY}" in each for each in nodes.wrong().values())
    until_free(cluster)


def test_what_other_runs_have_taken_is_said_and_what_is_left_of_the_same_run_is_found(
    cluster: Emulated, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A broker that was stopped may be started again, also by Ray; after an error nobody does it."""
    monkeypatch.setattr(ray_runtime, "FREE_S", 1.0)
    with silent() as address, connected(cluster):
        first = ray_runtime.Nodes("first", "token", 3)
        for each in MACHINES[:3]:
            first.start(each, address)
        pids = {name: first.pid(name) for name in first.actors}
        with pytest.raises(ValueError, match="have 4 of the resource provider, and other runs all but 1 of them"):
            ray_runtime.Nodes("second", "token", 2)
        ray_runtime.Nodes("second", "token", 1)
        with pytest.raises(KeyboardInterrupt), first:
            raise KeyboardInterrupt
        again = ray_runtime.Nodes("first", "token", 4)
        for each in MACHINES:
            again.start(each, address)
        assert {name: again.pid(name) for name in pids} == pids
        with pytest.raises(ArithmeticError), again:
            raise ArithmeticError
        monkeypatch.setattr(ray_runtime, "FREE_S", 40.0)
        ray_runtime.Nodes("second", "token", 4)
    until_free(cluster)


def test_a_provider_that_is_about_to_end_when_it_is_found_goes_on(cluster: Emulated) -> None:
    """Its end lies before the new call in its queue: Ray would try that call for ever."""
    with connected(cluster) as ray:
        with silent() as address:
            first = ray_runtime.Nodes("run", "token", 1)
            first.start(MACHINES[0], address)
            before = first.pid("p0")
            first.actors["p0"].end.remote()  # behind its run, which goes on
            again = ray_runtime.Nodes("run", "token", 1)
            again.start(MACHINES[0], NOBODY)
            again.again()
            assert again.pid("p0") == before
        assert ray.wait([again._runs["p0"]], timeout=60)[0]
        assert "ConnectionError" in again.wrong()["p0"]
    until_free(cluster)


def test_a_provider_that_has_ended_after_it_was_found_is_started_anew(cluster: Emulated) -> None:
    """Else a broker that is started again would wait for it for ever."""
    with connected(cluster) as ray:
        with silent() as address:
            first = ray_runtime.Nodes("run", "token", 1)
            first.start(MACHINES[0], address)
            first.pid("p0")
            again = ray_runtime.Nodes("run", "token", 1)
            again.start(MACHINES[0], NOBODY)
            ray.kill(first.actors["p0"])
        deadline = time.monotonic() + 60
        while "ConnectionError" not in again.wrong().get("p0", ""):
            assert time.monotonic() < deadline, again.wrong()
            again.again()
            time.sleep(0.1)
    until_free(cluster)


def test_a_node_that_is_removed_takes_its_provider_with_it_and_nothing_else(
    cluster: Emulated, results: Path, quiet: list[float]
) -> None:
    with started(cluster, results, after=5) as process:
        cluster.kill("home1")
        assert process.wait(120) == 0
    made = record(results)
    assert made["samples"]["loss"] == quiet
    assert made["summary"]["lost"] == 1
