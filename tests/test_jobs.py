"""Claims about `jobs/`: what is in there is what Ray, Kubernetes, Slurm and torchrun take, and the commands work.

`submit.sh` is run against a real cluster of this machine, `torchrun.sh` against the real torchrun; Slurm's two commands
are stood in for, and what they start is real.
"""

from __future__ import annotations

import os
import shlex
import socket
import subprocess
import sys
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path
from typing import Any

import pytest
import yaml

from llmsys import compose
from llmsys.job import Record
from ray_cluster import SETTINGS, apart

JOBS = Path(__file__).resolve().parents[1] / "jobs"
SHORT = ("train.steps=4", "train.length=32", "data.num_examples=8", "train.threads=1", "profile.warmup=1")


def sh(script: str, *words: str, **environment: str) -> subprocess.CompletedProcess[str]:
    """Runs a script of `jobs/`."""
    env = {**os.environ, **environment}
    command = ["bash", str(JOBS / script), *words]
    return subprocess.run(command, capture_output=True, text=True, env=env, timeout=240, check=False)


def records(results: Path) -> list[Record]:
    found = [Record.read(path.parent) for path in results.glob("*/*/record.json")]
    return [each for each in found if each is not None]


def free_port() -> int:
    with closing(socket.socket()) as any_socket:
        any_socket.bind(("127.0.0.1", 0))
        return int(any_socket.getsockname()[1])


@pytest.fixture(scope="module")
def dashboard() -> Iterator[dict[str, str]]:
    """Of a cluster of this machine: where jobs are submitted, and what Ray's client and its nodes connect to."""
    api, client = free_port(), free_port()
    with apart(include_dashboard=True, dashboard_port=api, ray_client_server_port=client) as address:
        yield {
            "address": address,
            "RAY_API_SERVER_ADDRESS": f"http://127.0.0.1:{api}",
            "RAY_AUTH_MODE": SETTINGS["RAY_AUTH_MODE"],
            "client": f"ray://127.0.0.1:{client}",
        }


@pytest.mark.parametrize("script", sorted(path.name for path in JOBS.glob("*.sh")))
def test_scripts_are_bash(script: str) -> None:
    assert subprocess.run(["bash", "-n", JOBS / script], check=False).returncode == 0
    assert "set -euo pipefail" in (JOBS / script).read_text()


def test_every_command_in_the_files_composes() -> None:
    """Experiments and settings that they name are there."""
    named = 0
    for path in JOBS.iterdir():
        for line in path.read_text().replace("`", " ").splitlines():
            words = line.replace("|", " ").replace('"', " ").split()
            if any(word.startswith("+exp=") and word[5:].isidentifier() for word in words):
                at = next(index for index, word in enumerate(words) if word.startswith("+exp="))
                own = [word for word in words[at:] if "=" in word and word.islower()]
                compose.compose([word.partition(",")[0] for word in own])
                named += 1
    assert named > 8


def test_the_cluster_s_file_is_one_that_ray_takes() -> None:
    from ray.autoscaler._private.util import prepare_config, validate_config

    config = prepare_config(yaml.safe_load((JOBS / "cluster.yaml").read_text()))
    validate_config(config)
    assert all("ray start" in command or "ray stop" in command for command in config["worker_start_ray_commands"])
    assert "--dashboard-host=127.0.0.1" in " ".join(config["head_start_ray_commands"])


def test_the_ray_job_of_kubernetes_asks_for_what_its_command_needs() -> None:
    job: dict[str, Any] = yaml.safe_load((JOBS / "rayjob.yaml").read_text())
    spec = job["spec"]
    words = shlex.split(spec["entrypoint"])
    assert words[:4] == ["python", "-m", "llmsys", "-m"]
    assert "dispatch=ray" in words
    assert yaml.safe_load(spec["runtimeEnvYAML"])["env_vars"]["LLMSYS_RESULTS"].startswith("/")
    cluster = spec["rayClusterSpec"]
    pods = [cluster["headGroupSpec"], *cluster["workerGroupSpecs"]]
    for pod in pods:
        (container,) = pod["template"]["spec"]["containers"]
        mounts = {mount["name"]: mount["mountPath"] for mount in container["volumeMounts"]}
        volumes = {volume["name"] for volume in pod["template"]["spec"]["volumes"]}
        assert mounts["results"] == "/results"
        assert mounts.keys() == volumes, "what is mounted is there"
    version = next(
        line for line in (JOBS.parent / "constraints.txt").read_text().splitlines() if line.startswith("ray==")
    )
    assert cluster["rayVersion"] == version.partition("==")[2]


@pytest.mark.parametrize(
    ("script", "words", "environment", "said"),
    [
        ("submit.sh", (), {}, "nothing to run"),
        ("submit.sh", ("+exp=lorafa_minilm",), {"LLMSYS_RESULTS": ""}, "LLMSYS_RESULTS: must be set"),
        ("submit.sh", ("+exp=lorafa_minilm",), {"LLMSYS_RESULTS": "results"}, "must be an absolute path"),
        ("slurm.sh", ("+exp=lorafa_minilm",), {}, "not in an allocation"),
        ("torchrun.sh", (), {}, "nothing to run"),
        ("torchrun.sh", ("+exp=x",), {"NODES": "2", "RANKS": "1"}, "NODES=2: needs HOST"),
    ],
)
def test_what_is_missing_is_said_before_anything_is_sent(
    script: str, words: tuple[str, ...], environment: dict[str, str], said: str
) -> None:
    done = sh(script, *words, **environment)
    assert done.returncode == 2
    assert said in done.stderr


@pytest.mark.slow
def test_a_submitted_experiment_leaves_its_record_on_the_shared_path(dashboard: dict[str, str], results: Path) -> None:
    """And its table in the job's log; the exit code is the driver's."""
    words = ("+exp=lorafa_minilm", "smoke=true", "train.threads=1")
    done = sh("submit.sh", *words, LLMSYS_RESULTS=str(results), **dashboard)
    assert done.returncode == 0, done.stdout + done.stderr
    (record,) = records(results)
    assert (record.status, record.name) == ("ok", "lorafa_minilm")
    assert record.env["dispatch"]["kind"] == "ray"
    assert "lorafa_peft r=16 │" in done.stdout


@pytest.mark.slow
def test_a_submitted_sweep_with_a_mistake_and_one_without(dashboard: dict[str, str], results: Path) -> None:
    """What shells would read otherwise arrives as it was typed: brackets, braces and spaces."""
    own = {"LLMSYS_RESULTS": str(results), **dashboard}
    done = sh("submit.sh", "-m", *SHORT, "train.seed=range(0, 2)", "train.betas=[0.9, 0.99]", **own)
    assert done.returncode != 0
    assert "betas" in done.stdout + done.stderr
    assert records(results) == []
    done = sh("submit.sh", "-m", *SHORT, "train.seed=range(0, 2)", **own)
    assert done.returncode == 0, done.stdout + done.stderr
    assert {each.config["train"]["seed"] for each in records(results)} == {0, 1}
    assert done.stdout.count(" full │") == 2


@pytest.mark.slow
def test_through_ray_s_client_it_is_the_same(dashboard: dict[str, str], results: Path) -> None:
    command = [sys.executable, "-m", "llmsys", *SHORT, "dispatch=ray", f"dispatch.address={dashboard['client']}"]
    env = {**os.environ, **SETTINGS, "LLMSYS_RESULTS": str(results)}
    done = subprocess.run(command, capture_output=True, text=True, env=env, timeout=120, check=False)
    assert done.returncode == 0, done.stderr
    (record,) = records(results)
    assert record.status == "ok"


@pytest.mark.slow
def test_torchrun_s_ranks_make_one_run(results: Path) -> None:
    words = (*SHORT, "engine=ddp", "train.global_batch=4", "train.micro_batch=2")
    own = {"LLMSYS_RESULTS": str(results), "RANKS": "2", "PORT": str(free_port())}
    done = sh("torchrun.sh", *words, **own)
    assert done.returncode == 0, done.stderr
    (record,) = records(results)
    assert (record.status, record.world) == ("ok", 2)
    assert done.stdout.count("│ full ") == 1, "one table, not one of each rank"


@pytest.mark.slow
def test_torchrun_is_told_what_does_not_fit(results: Path) -> None:
    own = {"LLMSYS_RESULTS": str(results), "RANKS": "1", "PORT": str(free_port())}
    done = sh("torchrun.sh", "-m", *SHORT, "train.seed=0,1", **own)
    assert done.returncode != 0
    assert "dispatch=torchrun: is one run" in done.stderr


STAND_INS = {
    "scontrol": "printf 'node0\\n'",
    "srun": 'while [[ $1 == --* ]]; do shift; done; if [[ $1 == hostname ]]; then echo 127.0.0.1; else exec "$@"; fi',
    # of its own it would end every Ray of this machine, the tests' others too
    "ray": 'echo "$@" > "$0.said"; while [[ $1 != -- ]]; do shift; done; shift; '
    'RAY_AUTH_MODE=disabled RAY_ADDRESS=$CLUSTER exec "$@"',
}


@pytest.mark.slow
def test_an_allocation_of_slurm_runs_a_sweep_and_ends(dashboard: dict[str, str], results: Path, tmp_path: Path) -> None:
    for name, body in STAND_INS.items():
        (tmp_path / name).write_text(f"#!/usr/bin/env bash\n{body}\n")
        (tmp_path / name).chmod(0o755)
    own = {"SLURM_JOB_ID": "17", "SLURM_JOB_NODELIST": "node0", "SLURM_CPUS_PER_TASK": "2", "SLURM_GPUS_ON_NODE": "0"}
    own |= {**SETTINGS, "CLUSTER": dashboard["address"]}
    own |= {"LLMSYS_RESULTS": str(results), "PATH": f"{tmp_path}:{os.environ['PATH']}"}
    done = sh("slurm.sh", "-m", *SHORT, "train.seed=0,1", **own)
    assert done.returncode == 0, done.stdout + done.stderr
    assert [each.status for each in records(results)] == ["ok", "ok"]
    assert records(results)[0].env["dispatch"]["kind"] == "ray"
    assert not (results / ".driver-17").exists()
    words = (tmp_path / "ray.said").read_text().split()
    taken = subprocess.run(["ray", "symmetric-run", "--help"], capture_output=True, text=True, check=True).stdout
    assert words[0] == "symmetric-run"
    assert all(word in taken for word in ("--address", "--min-nodes"))
    assert {"--address", "--min-nodes", "--num-cpus=2", "--num-gpus=0"} <= set(words)
