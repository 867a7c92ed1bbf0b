"""Claims about `python -m llmsys` as a user starts it: what is run, what is not run again, and the exit code."""

from __future__ import annotations

import dataclasses
import fcntl
import os
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from llmsys import compose, job
from llmsys.job import Record

Run = Callable[..., "subprocess.CompletedProcess[str]"]
SHORT = ("train.steps=3", "train.length=32", "data.num_examples=40", "train.threads=1", "profile.warmup=1")


def records(results: Path) -> list[Record]:
    found = [Record.read(path.parent) for path in sorted(results.rglob("record.json"))]
    return [record for record in found if record is not None]


def test_a_second_time_is_not_run_again(llmsys: Run, results: Path) -> None:
    assert llmsys(*SHORT).returncode == 0
    (first,) = records(results)
    again = llmsys(*SHORT)
    assert again.returncode == 0
    assert "done before (ok)" in again.stderr
    assert records(results) == [first]
    assert llmsys(*SHORT, "reuse=never").returncode == 0
    (third,) = records(results)
    assert third.attempts == 2


def test_a_record_of_other_code_is_run_again_unless_any_will_do(results: Path) -> None:
    from llmsys.dispatch import finished

    config = compose.compose([*SHORT, f"results={results}"])
    made = job.make(config)
    record = Record(name="scratch", run_id=made.run_id, task="train", status="ok", code_hash="other")
    Path(made.out).mkdir(parents=True)
    record.write(Path(made.out))
    assert finished(made) is None
    assert finished(job.make({**config, "reuse": "any"})) == record
    for status in job.STATUSES:
        Record(name="scratch", run_id="", task="train", status=status, code_hash=job.code_hash()).write(Path(made.out))
        assert (finished(made) is not None) == (status in ("ok", "oom", "unsupported"))


def test_a_failing_job_leaves_the_others_recorded_and_exit_code_1(llmsys: Run, results: Path) -> None:
    """A learning rate of 1e30 makes the loss NaN in the second step."""
    done = llmsys("-m", *SHORT, "train.lr_scale=1,1e30", "train.clip=0")
    assert done.returncode == 1, done.stderr
    assert sorted((r.status, r.reason) for r in records(results)) == [("failed", "nan"), ("ok", "")]
    assert "failed (nan)" in done.stdout


@pytest.mark.slow
def test_out_of_memory_is_exit_code_0(llmsys: Run, results: Path) -> None:
    done = llmsys("model=llama_85m", "train.steps=1", "dispatch.memory_gib=1")
    assert done.returncode == 0, done.stderr
    assert [r.status for r in records(results)] == ["oom"]


@pytest.mark.slow
def test_a_refusal_says_what_is_needed_and_what_would_run_and_is_tried_again(llmsys: Run, results: Path) -> None:
    """What would run is what was typed, with one change."""
    arguments = ("+exp=lorafa_llama7b", "hardware.mem_gib=8", "method.r=64", "train.recompute='mlp:2,none:30'")
    done = llmsys(*arguments)
    assert done.returncode == 0
    (record,) = records(results)
    assert (record.status, record.reason) == ("skipped", "memory")
    for words in ("weights", "GiB", "8", "python -m llmsys +exp=lorafa_llama7b", "model=llama_tiny"):
        assert words in record.error, words
    typed = "  python -m llmsys +exp=lorafa_llama7b hardware.mem_gib=8 method.r=64"
    assert f"""{typed} "train.recompute='mlp:2,none:30'" force=true   # in spite of this""" in record.error.splitlines()
    assert record.config["command"] == list(arguments)
    assert record.seconds < 60, "before anything is loaded"
    llmsys(*arguments)
    assert records(results)[0].attempts == 2


def test_two_processes_with_one_id_make_one_run(results: Path) -> None:
    """The folder's lock is held by this test until the process says that it waits."""
    made = job.make(compose.compose([*SHORT, f"results={results}"]))
    out = Path(made.out)
    out.mkdir(parents=True)
    lock = os.open(out / ".lock", os.O_RDWR | os.O_CREAT)
    fcntl.flock(lock, fcntl.LOCK_EX)
    env = {**os.environ, "LLMSYS_RESULTS": str(results)}
    command = [sys.executable, "-m", "llmsys", *SHORT]
    with subprocess.Popen(command, env=env, stderr=subprocess.PIPE, stdout=subprocess.DEVNULL, text=True) as waiting:
        assert waiting.stderr is not None
        assert "another process is making this run" in waiting.stderr.readline()
        done = Record(name="scratch", run_id=made.run_id, task="train", status="ok", config=made.config)
        dataclasses.replace(done, code_hash=job.code_hash()).write(out)
        os.close(lock)
        assert "done before (ok)" in waiting.stderr.read()
        assert waiting.wait() == 0


def test_an_interrupted_sweep_ends_with_130_and_keeps_what_was_done(results: Path) -> None:
    env = {**os.environ, "LLMSYS_RESULTS": str(results)}
    command = [sys.executable, "-m", "llmsys", "-m", *SHORT, "train.steps=3,100000"]
    with subprocess.Popen(command, env=env, stderr=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as sweep:
        assert sweep.stderr is not None
        for line in sweep.stderr:
            if line.startswith("[2/2]"):
                break
        sweep.send_signal(signal.SIGTERM)
        _, rest = sweep.communicate(timeout=60)
        assert sweep.returncode == 130, rest
    assert sorted(r.status for r in records(results)) == ["interrupted", "ok"]


def test_a_sweep_adds_its_baselines_once() -> None:
    """Of the real launcher: two methods and two seeds, and for each seed one probe and one majority."""
    code = (
        "import sys; from llmsys import main\n"
        "def show(configs):\n"
        "    for made in main.make_jobs(configs):\n"
        "        print(made.config['method']['kind'], made.config['train']['seed'], *made.config['command'])\n"
        "    return 0\n"
        "main.submit = show\n"
        "sys.argv = ['llmsys', '-m', '+exp=lorafa_minilm', 'method=full,lora_peft', 'train.seed=0,1']\n"
        "main.main()\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    kinds = ["full", "lora_peft", "majority", "probe"]
    words = "+exp=lorafa_minilm {}train.seed={}{}"
    typed = {
        **{(kind, seed): words.format(f"method={kind} ", seed, "") for kind in kinds[:2] for seed in (0, 1)},
        **{(kind, seed): words.format("", seed, f" method={kind}") for kind in kinds[2:] for seed in (0, 1)},
    }
    lines = [f"{kind} {seed} {command}" for (kind, seed), command in typed.items()]
    assert sorted(done.stdout.split("\n")[:-1]) == sorted(lines), done.stderr


@pytest.mark.slow
def test_a_damaged_record_is_set_aside_and_the_run_made(llmsys: Run, results: Path) -> None:
    made = job.make(compose.compose([*SHORT, f"results={results}"]))
    out = Path(made.out)
    out.mkdir(parents=True)
    (out / "record.json").write_text('{"schema": 1, "na')
    done = llmsys(*SHORT)
    assert done.returncode == 0, done.stderr
    assert "record.json.bad" in done.stderr
    assert [r.status for r in records(results)] == ["ok"]
