"""Claims about runs on the nodes of a cluster: the same results as here, and however one ends, it is said within
seconds, what it had is free again, and nothing is left of it.

Real Ray, on nodes that this machine emulates. Progress messages are the events that tests wait for.
"""

from __future__ import annotations

import dataclasses
import datetime
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml

from llmsys import compose, job
from llmsys.comm.place import log_name
from llmsys.dispatch import process
from llmsys.dispatch.stop import Stop
from llmsys.job import Job, Record
from ray_cluster import SETTINGS, Emulated, emulated

SHORT = ("train.steps=4", "train.length=32", "data.num_examples=8", "train.threads=1", "profile.warmup=1")
TWO = ("engine=ddp", "train.world=2", "train.global_batch=4", "train.micro_batch=2")
LONG = ("train.steps=100000", "train.global_batch=4", "train.micro_batch=2", "train.length=32", "train.threads=1")


@pytest.fixture(scope="module")
def cluster() -> Iterator[Emulated]:
    with emulated() as made:
        yield made


@pytest.fixture
def connected(cluster: Emulated) -> Iterator[Any]:
    """`llmsys.dispatch.ray`, connected to the cluster."""
    from llmsys.dispatch import ray

    ray.connect(cluster.cluster.address, 1)
    yield ray
    ray.disconnect()


def make(results: Path, *overrides: str) -> Job:
    made = job.make(compose.compose([f"results={results}", *overrides]))
    Path(made.out).mkdir(parents=True, exist_ok=True)
    return made


def alive(results: Path) -> list[int]:
    """The process ids of ranks of runs in this folder that still are."""
    logs = [log.read_text() for log in results.glob("*/*/log*.txt")]
    pids = [int(pid) for log in logs for pid in re.findall(r"rank \d+ of \d+, process (\d+)", log)]
    return [pid for pid in pids if Path(f"/proc/{pid}").exists()]


def ranks(made: Job) -> list[int]:
    """Of the last attempt, from its logs, rank 0 first."""
    logs = (Path(made.out) / log_name(rank) for rank in range(made.config["train"]["world"]))
    return [int(re.findall(r"rank \d+ of \d+, process (\d+)", log.read_text())[-1]) for log in logs]


def records(results: Path) -> list[Record]:
    found = [Record.read(path.parent) for path in results.glob("*/*/record.json")]
    return [each for each in found if each is not None]


def free(ray: Any) -> float:
    """Cores that Ray can give away now."""
    return float(ray.ray.available_resources().get("CPU", 0.0))


def comes_true(what: Callable[[], bool], within_s: float = 15.0) -> bool:
    """Waits for it."""
    deadline = time.monotonic() + within_s
    while not (found := what()) and time.monotonic() < deadline:
        time.sleep(0.05)
    return found


class Run:
    """Runs `made`; at the first report of step `at` calls `fault` with the ranks' process ids, rank 0 first."""

    def __init__(self, ray: Any, made: Job, fault: Callable[[list[int]], None], at: int = 2) -> None:
        self.pids: list[int] = []
        self.fault_at = 0.0
        self.phases: list[str] = []

        def progress(values: dict[str, Any]) -> None:
            self.phases.append(str(values.get("phase", "")))
            if values.get("step", 0) >= at and not self.pids:
                self.pids = ranks(made)
                self.fault_at = time.monotonic()
                fault(self.pids)

        self.record: Record = ray.run(made, progress, -1, Stop())
        self.seconds_after = time.monotonic() - self.fault_at

    @property
    def left(self) -> list[int]:
        """Which of the ranks still are."""
        return [pid for pid in self.pids if Path(f"/proc/{pid}").exists()]


def same(record: Record) -> dict[str, Any]:
    """Of a record, what where it was made must not change: everything but the environment, times and memory."""
    values = dataclasses.asdict(record)
    own = ("env", "started", "seconds", "samples", "config", "attempts")
    timed = ("_ms", "per_s", "gib", "tflops", "mfu", "hfu", "overhead")
    values["summary"] = {k: v for k, v in record.summary.items() if not any(word in k for word in timed)}
    return {key: value for key, value in values.items() if key not in own} | {
        "config": {key: value for key, value in record.config.items() if key not in ("dispatch", "results", "command")}
    }


@pytest.mark.slow
def test_eight_jobs_on_four_nodes_run_at_once_each_in_workers_of_its_own(
    cluster: Emulated, llmsys: Callable[..., subprocess.CompletedProcess[str]], results: Path
) -> None:
    begun = time.time()
    done = llmsys("-m", *SHORT, *cluster.words, "train.seed=0,1,2,3,4,5,6,7")
    assert done.returncode == 0, done.stderr
    made = records(results)
    assert [each.status for each in made] == ["ok"] * 8
    assert len({pid for each in made for pid in each.env["dispatch"]["workers"]}) == 8
    assert done.stdout.count(" full │") == 8, "the table at the end"
    starts = [datetime.datetime.fromisoformat(each.started).timestamp() for each in made]
    assert max(starts) - begun < 60, "at the same time; how soon is measured by benchmarks/ray_dispatch.py"


@pytest.mark.slow
def test_two_ranks_on_two_nodes_are_what_two_processes_are(connected: Any, results: Path, tmp_path: Path) -> None:
    words = (*SHORT, *TWO)
    away = make(results, *words, "dispatch=ray", "dispatch.nodes=2")
    here = make(tmp_path / "here", *words)
    assert away.run_id == here.run_id
    record = connected.run(away, lambda values: None, -1)
    assert record.status == "ok", record.error
    other = process.run(here, lambda values: None, os.open(os.devnull, os.O_RDONLY))
    assert same(record) == same(other)
    assert len(record.env["dispatch"]["nodes"]) == 2
    assert record == Record.read(Path(away.out))


def test_a_killed_rank_of_four_ends_the_run_and_frees_what_it_had(connected: Any, results: Path) -> None:
    all_free = free(connected)
    words = ("engine=ddp", "dispatch=ray", "dispatch.nodes=4")
    made = make(results, *LONG, *words, "train.world=4", "train.global_batch=8", "dispatch.retries=1")
    run = Run(connected, made, lambda pids: os.kill(pids[2], signal.SIGKILL))
    assert (run.record.status, run.record.reason) == ("crashed", "signal")
    assert run.record.attempts == 1, "that was nobody who took a node away"
    assert "killed by SIGKILL" in run.record.error
    assert run.seconds_after < 15
    assert len(run.pids) == 4
    assert run.left == []
    assert comes_true(lambda: free(connected) == all_free)


class Sweep:
    """`python -m llmsys -m` in a process of its own, which is ended with the block."""

    def __init__(self, cluster: Emulated, results: Path, *words: str) -> None:
        self.results = results
        command = [sys.executable, "-m", "llmsys", "-m", *LONG, *cluster.words, f"results={results}", *words]
        self.process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)

    def __enter__(self) -> Sweep:
        return self

    def __exit__(self, *_: object) -> None:
        self.process.kill()
        self.process.communicate()

    def running(self, seed: int) -> str:
        """Waits for the first steps of the run with this seed; the name of the node that it is on."""

        def log() -> str:
            for path in self.results.glob("*/*/metrics.jsonl"):
                config = yaml.safe_load((path.parent / "config.yaml").read_text())
                if path.stat().st_size and config["train"]["seed"] == seed:
                    return (path.parent / "log.txt").read_text()
            return ""

        assert comes_true(lambda: bool(log()), 60), "no step was made"
        said = re.findall(r"'nodes': \['(\w+)'", log())
        return str(said[-1])

    def end(self, within_s: float) -> str:
        """What it has said, when it has ended by itself."""
        out, err = self.process.communicate(timeout=within_s)
        return out + err


@pytest.mark.slow
@pytest.mark.parametrize("retries", [0, 1])
def test_a_node_that_goes_in_a_sweep_takes_its_own_runs_along_and_no_others(
    cluster: Emulated, results: Path, retries: int
) -> None:
    """A run that asked for it is begun again on another node, from its checkpoint."""
    steps = ("train.steps=300", "train.checkpoint_every=1", f"dispatch.retries={retries}")
    with Sweep(cluster, results, *steps, "train.seed=0,1,2", "dispatch.cpus=2") as sweep:
        seed, node = next((seed, node) for seed in range(3) if (node := sweep.running(seed)) != "node0")
        cluster.kill(node)
        said = sweep.end(120)
    cluster.add(node)
    assert sweep.process.returncode == (0 if retries else 1), said
    made = {each.config["train"]["seed"]: each for each in records(results)}
    lost = made.pop(seed)
    assert [(each.status, each.error) for each in made.values()] == [("ok", "")] * 2
    if retries:
        assert (lost.status, lost.attempts) == ("ok", 2)
        assert lost.resumed_from_step
    else:
        assert (lost.status, lost.reason) == ("crashed", "node"), lost.error


@pytest.mark.slow
def test_ctrl_c_stops_all_runs_between_two_steps_and_frees_what_they_had(
    cluster: Emulated, connected: Any, results: Path
) -> None:
    with Sweep(cluster, results, "train.seed=0,1,2", "dispatch.max_parallel=2") as sweep:
        sweep.running(0)
        sweep.running(1)
        sweep.process.send_signal(signal.SIGTERM)  # as Ctrl-C, which a shell's background jobs ignore
        said = sweep.end(30)
        assert sweep.process.returncode == 130, said
        assert [each.status for each in records(results)] == ["interrupted"] * 2
        assert comes_true(lambda: free(connected) == connected.ray.cluster_resources()["CPU"])
        assert alive(results) == []


@pytest.mark.slow
def test_a_run_that_waits_for_room_says_so_and_ends_at_ctrl_c(cluster: Emulated, results: Path, tmp_path: Path) -> None:
    """Its record says of which commit it is, and nothing of a machine, for it was on none."""
    with Sweep(cluster, tmp_path / "others", "train.seed=0,1,2,3", "dispatch.cpus=2") as others:
        for seed in range(4):
            others.running(seed)
        with Sweep(cluster, results, "train.seed=9", "dispatch.cpus=2") as sweep:
            assert sweep.process.stderr is not None
            assert any("waiting for room" in line for line in iter(sweep.process.stderr.readline, ""))
            sweep.process.send_signal(signal.SIGTERM)
            sweep.end(30)
            assert sweep.process.returncode == 130
    (record,) = records(results)
    assert record.status == "interrupted"
    assert record.env.keys() == {"git_sha", "git_dirty"}


@pytest.mark.slow
def test_a_signal_to_the_driver_s_group_ends_runs_and_not_the_cluster_below_them(results: Path) -> None:
    """As `timeout` sends it: the cluster that the driver has started is in a group of its own."""
    command = [sys.executable, "-m", "llmsys", *LONG, "dispatch=ray", f"results={results}"]
    env = {**os.environ, **SETTINGS}
    env.pop("RAY_ADDRESS", None)
    with subprocess.Popen(command, env=env, stderr=subprocess.PIPE, text=True, process_group=0) as driver:
        assert comes_true(lambda: any(path.stat().st_size for path in results.glob("*/*/metrics.jsonl")), 90)
        os.killpg(driver.pid, signal.SIGTERM)
        said = driver.communicate(timeout=30)[1]
    assert driver.returncode == 130, said
    (record,) = records(results)
    assert (record.status, record.reason) == ("interrupted", "signal")
    assert "stopped after step" in record.error


@pytest.mark.slow
def test_a_driver_that_is_killed_leaves_no_process(cluster: Emulated, connected: Any, results: Path) -> None:
    with Sweep(cluster, results, "train.seed=0,1") as sweep:
        sweep.running(0)
        sweep.running(1)
        sweep.process.kill()
        sweep.end(10)
        assert comes_true(lambda: alive(results) == [], 30)
        assert comes_true(lambda: free(connected) == connected.ray.cluster_resources()["CPU"], 30)


@pytest.mark.slow
def test_a_stopped_rank_is_a_hang_that_names_it(connected: Any, results: Path) -> None:
    made = make(results, *LONG, *TWO, "dispatch=ray", "dispatch.heartbeat_s=6")
    run = Run(connected, made, lambda pids: os.kill(pids[1], signal.SIGSTOP))
    assert (run.record.status, run.record.reason) == ("hang", "no heartbeat")
    assert run.record.error.startswith("rank 1: ")
    assert run.left == []


@pytest.mark.slow
def test_a_killed_worker_is_told_from_a_killed_rank(connected: Any, results: Path) -> None:
    """The rank goes with its keeper, and what Ray says of that is passed on."""

    def kill(pids: list[int]) -> None:
        os.kill(int(Path(f"/proc/{pids[0]}/stat").read_text().rpartition(")")[2].split()[1]), signal.SIGKILL)

    run = Run(connected, make(results, *LONG, "dispatch=ray"), kill)
    assert (run.record.status, run.record.reason) == ("crashed", "worker")
    assert run.left == []


@pytest.mark.slow
def test_zero3_on_two_nodes_is_what_two_processes_are(connected: Any, results: Path, tmp_path: Path) -> None:
    words = (*SHORT, *TWO, "engine=zero3")
    record = connected.run(make(results, *words, "dispatch=ray", "dispatch.nodes=2"), lambda values: None, -1)
    other = process.run(make(tmp_path / "here", *words), lambda values: None, os.open(os.devnull, os.O_RDONLY))
    assert record.status == "ok", record.error
    assert same(record) == same(other)


def test_what_is_wrong_is_said_before_any_job_starts(
    cluster: Emulated, llmsys: Callable[..., subprocess.CompletedProcess[str]], results: Path
) -> None:
    for words, said in (
        (("dispatch=ray", "dispatch.address=127.0.0.1:9"), "dispatch.address=127.0.0.1:9: does not answer"),
        ((*cluster.words, "dispatch.cpus=3"), "a run needs 3 CPU, and the cluster does not have that:\n  "),
    ):
        done = llmsys(*SHORT, *words)
        assert done.returncode == 1
        assert said in done.stderr
        assert not list(results.glob("*/*"))
