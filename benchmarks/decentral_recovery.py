"""How long a job on provider processes stands still when one of them, or the broker, is killed or hangs.

    python benchmarks/decentral_recovery.py [--runs 5] [--steps 16] [--out benchmarks/records]

Four providers on loopback train `llama_6m`, by the command that a user gives; once the middle step is committed a
signal goes to the owner of a stage, and what counts is the time until the next commit, in which a whole step is
computed. In turns:

    warm      SIGKILL, with a spare in the backup pool
    none      SIGKILL, three providers all of which have stages: the other two take over
    hang      SIGSTOP, with a spare: nothing is closed, three beats are missed
    broker    SIGKILL to the broker and its command, which is given again; its providers dial the same port

Losses of every run must be those of one provider alone, bit for bit.
"""

from __future__ import annotations

import argparse
import json
import os
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from llmsys.comm.place import listen
from llmsys.decentral.event_log import last_step, read
from llmsys.decentral.fleet import Provider
from llmsys.decentral.processes import Processes
from llmsys.job import Record
from llmsys.table import piped
from script_record import RECORDS, Script

MODEL = (
    *("train.global_batch=4", "train.micro_batch=1", "train.length=64", "train.log_every=1", "train.warmup_steps=2"),
    *("data.max_train=400", "data.max_val=1", "train.save_final=false"),
    *("task.up_mbit=2500", "task.down_mbit=2500"),  # what a relay of Python moves over loopback
)
SCENARIOS = {
    "warm": ("task.providers=4", "task.stages=3", "task.reserve=1", "SIGKILL"),
    "none": ("task.providers=3", "task.stages=2", "task.reserve=0", "SIGKILL"),
    "hang": ("task.providers=4", "task.stages=3", "task.reserve=1", "SIGSTOP"),
}


def command(steps: int, *more: str) -> list[str]:
    return [sys.executable, "-m", "llmsys", "+exp=decentral_train", *MODEL, f"train.steps={steps}", *more]


def read_record(results: Path) -> dict[str, Any]:
    (path,) = results.glob("*/*/record.json")
    found: dict[str, Any] = json.loads(path.read_text())
    assert found["status"] == "ok", found["error"]
    return found


def ran(steps: int, *more: str) -> dict[str, Any]:
    with tempfile.TemporaryDirectory() as folder:
        env = {**os.environ, "LLMSYS_RESULTS": folder}
        subprocess.run(command(steps, *more), env=env, check=True, stdout=subprocess.DEVNULL)
        return read_record(Path(folder))


def broker(steps: int) -> tuple[dict[str, Any], float]:
    """The record, and seconds from the kill to the next commit."""
    descriptor, port = listen("127.0.0.1")
    os.close(descriptor)
    with tempfile.TemporaryDirectory() as folder:
        token = Path(folder) / "token"
        token.write_text("of this benchmark")
        words = [*SCENARIOS["warm"][:-1], "task.faults=[]", "task.start=none", f"task.listen=127.0.0.1:{port}"]
        words.append(f"task.token_file={token}")
        env = {**os.environ, "LLMSYS_RESULTS": f"{folder}/results"}

        def start() -> subprocess.Popen[bytes]:
            return subprocess.Popen(command(steps, *words), env=env, start_new_session=True, stdout=subprocess.DEVNULL)

        def committed() -> int:
            return max((last_step(read(path)) for path in Path(folder).glob("results/*/*/events.jsonl")), default=0)

        first = start()
        with Processes(Path(folder) / "providers", token.read_text()) as providers:
            while not [*Path(folder).glob("results/*/*/broker.json")]:
                assert first.poll() is None
                time.sleep(0.05)
            for at in range(4):
                machine = Provider(name=f"p{at}", tflops=0.05, efficiency=1.0, mem_gib=4, up_mbit=1000, down_mbit=1000)
                providers.start(machine, f"127.0.0.1:{port}")
            while (done := committed()) < steps // 2:
                assert first.poll() is None
                time.sleep(0.01)
            os.killpg(first.pid, signal.SIGKILL)
            first.wait()
            done, begin = committed(), time.perf_counter()
            second = start()
            while committed() <= done:
                assert second.poll() is None
                time.sleep(0.01)
            took = time.perf_counter() - begin
            assert second.wait(300) == 0
        return read_record(Path(folder) / "results"), took


def show(record: Record) -> str:
    """One record as Markdown."""
    rows = []
    for key, values in record.samples.items():
        if key.endswith("_s"):
            low, middle, high = min(values), statistics.median(values), max(values)
            rows.append([key.removesuffix("_s"), f"{middle:.2f}", f"{low:.2f}", f"{high:.2f}"])
    lines = piped(("to the next commit, seconds", "median", "least", "most"), rows)
    s = record.summary
    lines += [
        "",
        f"A step takes {s['step_ms']:.0f} ms. Runs: {s['runs']:.0f}, of which {s['equal']:.0f} have the losses of one "
        f"provider alone, bit for bit; committed steps with another loss: {s['steps_lost']:.0f}; attempts of a step "
        f"given up in a run: {s['most_again']:.0f} at most.",
    ]
    return "\n".join(lines)


def main(given: Sequence[str]) -> Record:
    """Measures, writes the record, prints its table, and returns it."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--runs", type=int, default=5)
    parser.add_argument("--steps", type=int, default=16)
    parser.add_argument("--out", type=Path, default=RECORDS)
    asked = parser.parse_args(given)
    script = Script("decentral_recovery")
    steps = asked.steps
    alone = ran(steps, "task.providers=1", "task.stages=1", "task.reserve=0", "task.faults=[]")["samples"]["loss"]
    samples: dict[str, list[float]] = {f"{name}_s": [] for name in (*SCENARIOS, "broker")}
    samples["step_ms"] = []
    made: list[dict[str, Any]] = []
    for _ in range(asked.runs):
        for name, (*words, what) in SCENARIOS.items():
            record = ran(steps, *words, f"task.faults=[stage1 {what} {steps // 2}]")
            samples[f"{name}_s"] += record["samples"]["recovery_s"]
            samples["step_ms"].append(record["summary"]["step_ms_p50"])
            made.append(record)
        record, took = broker(steps)
        samples["broker_s"].append(took)
        made.append(record)
    summary = {key: statistics.median(values) for key, values in samples.items()}
    summary |= {
        "runs": len(made),
        "equal": sum(each["samples"]["loss"] == alone for each in made),
        "steps_lost": sum(
            ours != own for each in made for ours, own in zip(each["samples"]["loss"], alone, strict=True)
        ),
        "most_again": max(each["summary"]["steps_again"] for each in made),
    }
    config = {"runs": asked.runs, "steps": steps, "model": list(MODEL), "scenarios": SCENARIOS}
    left = script.left(asked.out, f"{asked.runs}x{steps}", config=config, summary=summary, samples=samples)
    print(show(left))
    return left


if __name__ == "__main__":
    main(sys.argv[1:])
