"""Providers on the nodes of a cluster: Ray starts them, and again; the broker is rebuilt from its log."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from llmsys.decentral import ray_runtime
from llmsys.decentral.event_log import last_step, read
from ray_cluster import Emulated, emulated

pytestmark = pytest.mark.slow
SMALL = (
    *("train.steps=30", "train.global_batch=4", "train.micro_batch=2", "train.length=32", "train.warmup_steps=1"),
    *("model.num_layers=2", "data.max_train=40", "data.max_val=2", "task.faults=[]", "task.stages=2"),
)
COMMAND = (sys.executable, "-m", "llmsys", "+exp=decentral_train", *SMALL)
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


def kill_provider(cluster: Emulated, results: Path) -> None:
    """One that has a stage, by a signal to its actor's process."""
    import ray

    (folder,) = results.glob("*/*")
    ray.init(cluster.cluster.address, namespace=ray_runtime.NAMESPACE, log_to_driver=False)
    try:
        os.kill(ray.get(ray.get_actor(f"{folder.name}-p1").pid.remote()), signal.SIGKILL)
    finally:
        ray.shutdown()


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


def test_a_node_that_is_removed_takes_its_provider_with_it_and_nothing_else(
    cluster: Emulated, results: Path, quiet: list[float]
) -> None:
    with started(cluster, results, after=5) as process:
        cluster.kill("home1")
        assert process.wait(120) == 0
    made = record(results)
    assert made["samples"]["loss"] == quiet
    assert made["summary"]["lost"] == 1
