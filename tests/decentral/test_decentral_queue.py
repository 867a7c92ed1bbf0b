"""A queue of jobs: each is done once, whatever happens to its broker, by providers that stay."""

from __future__ import annotations

import fcntl
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from llmsys.comm.place import listen
from llmsys.decentral import queued
from llmsys.decentral.__main__ import main
from llmsys.decentral.contributions import FILE
from llmsys.decentral.event_log import last_step, read
from llmsys.decentral.events import Committed, Joined
from llmsys.decentral.job_queue import Queue, submit
from llmsys.dispatch.child import descendants

STEPS = 150
SMALL = (
    *("+exp=decentral_train", f"train.steps={STEPS}", "train.global_batch=4", "train.micro_batch=2", "train.length=32"),
    *("train.warmup_steps=1", "train.save_final=false", "model.num_layers=2", "data.max_train=40", "data.max_val=2"),
    *("task.providers=2", "task.stages=2", "task.reserve=0"),
)


def port() -> int:
    descriptor, found = listen("127.0.0.1")
    os.close(descriptor)
    return found


class Place:
    """A folder with a queue, credentials and results, and processes there, none of which outlives the test."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.port = folder, port()
        self.jobs, self.results = folder / "jobs", folder / "results"
        (folder / "secrets").mkdir()
        (folder / "secrets" / "token").write_text("for this test")
        self.processes: list[subprocess.Popen[bytes]] = []

    def start(self, name: str, *words: str) -> subprocess.Popen[bytes]:
        env = {**os.environ, "LLMSYS_RESULTS": str(self.results), "OMP_NUM_THREADS": "1"}
        with (self.folder / f"{name}.log").open("ab") as log:
            command = [sys.executable, "-m", "llmsys.decentral", *words]
            self.processes.append(subprocess.Popen(command, env=env, stdout=log, stderr=log))
        return self.processes[-1]

    def broker(self) -> subprocess.Popen[bytes]:
        words = ["--listen", f"127.0.0.1:{self.port}", "--credentials", str(self.folder / "secrets")]
        return self.start("broker", "broker", *words, "--queue", str(self.jobs), "--until-empty")

    def provider(self, name: str) -> subprocess.Popen[bytes]:
        own = ["--tflops", "0.05", "--mem-gib", "1", "--up-mbit", "1000", "--down-mbit", "1000", "--stay"]
        return self.start(name, "provider", *self.joining(), "--name", name, *own)

    def joining(self) -> list[str]:
        return ["--join", f"127.0.0.1:{self.port}", "--token-file", str(self.folder / "secrets" / "token")]

    def said(self, name: str) -> str:
        return (self.folder / f"{name}.log").read_text()

    def committed(self) -> int:
        return max((last_step(read(path)) for path in self.results.glob("*/*/events.jsonl")), default=0)


@pytest.fixture
def place(tmp_path: Path) -> Iterator[Place]:
    made = Place(tmp_path)
    yield made
    for each in made.processes:
        each.kill()
        each.wait()


def until(true: Callable[[], bool], broker: subprocess.Popen[bytes], seconds: float = 90.0) -> None:
    deadline = time.monotonic() + seconds
    while not true():
        assert broker.poll() is None
        assert time.monotonic() < deadline
        time.sleep(0.02)


@pytest.mark.timeout(300)
@pytest.mark.slow
def test_two_jobs_are_done_once_each_though_their_broker_is_killed_twice_in_the_middle(
    place: Place, capsys: pytest.CaptureFixture[str]
) -> None:
    """Both are the same to the last bit but for what they print: the losses of the one that was disturbed are those of
    the other."""
    first, second = submit(place.jobs, SMALL), submit(place.jobs, [*SMALL, f"train.log_every={STEPS}"])
    assert [first.name, second.name] == ["0001-decentral_train.txt", "0002-decentral_train.txt"]
    providers = [place.provider(name) for name in ("p0", "p1")]
    broker = place.broker()
    until(lambda: place.committed() >= 1, broker)
    watching = place.start("watching", "status", *place.joining(), "--watch", "--json")
    until(lambda: bool(place.said("watching")), broker)
    assert main(["status", *place.joining(), "--json"]) == 0
    status = json.loads(capsys.readouterr().out)
    assert status["queue"] == {"waiting": ["0002-decentral_train"], "done": [], "failed": []}
    assert sum(each["share"] for each in status["providers"].values()) == pytest.approx(1)
    assert main(["status", *place.joining()]) == 0
    assert "1 jobs wait, 0 are done, 0 failed" in capsys.readouterr().out
    before = place.committed()
    os.kill(descendants(broker.pid)[0], signal.SIGKILL)  # the job's own process: the queue begins it again
    until(lambda: place.committed() >= before + 10, broker)
    broker.kill()
    broker.wait()
    assert place.committed() < STEPS
    (place.jobs / "0000-late.txt").write_text("+exp=decentral_tran  # comes before all others, and is no job")
    broker = place.broker()
    assert broker.wait(150) == 0, place.said("broker")
    assert {path.parent.name: path.name for path in sorted(place.jobs.rglob("*.txt"))} == {
        "failed": "0000-late.txt", "done": second.name
    }  # fmt: skip
    assert sorted(path.name for path in (place.jobs / "done").iterdir()) == [first.name, second.name]
    assert "# failed: exp=decentral_tran: no such choice" in (place.jobs / "failed" / "0000-late.txt").read_text()
    records = {}
    for path in (first, second):
        out = Path((place.jobs / "done" / path.name).read_text().rpartition("# done: ")[2].strip())
        records[path] = json.loads((out / "record.json").read_text())
        noted = [event for event, _ in read(out / "events.jsonl")]
        assert [each.step for each in noted if isinstance(each, Committed)] == [*range(1, STEPS + 1)]
        assert sum(isinstance(each, Joined) for each in noted) == 2
        given: dict[str, Any] = json.loads((out / FILE).read_text())
        assert sum(each["share"] for each in given.values()) == pytest.approx(1)
    hit, quiet = records[first], records[second]
    assert (hit["status"], quiet["status"]) == ("ok", "ok")
    assert (hit["attempts"], quiet["attempts"]) == (3, 1)
    assert hit["samples"]["loss"] == quiet["samples"]["loss"]
    assert len(quiet["samples"]["loss"]) == STEPS
    done = [sum(r["summary"][f"provider/{name}/tflop"] for name in ("p0", "p1")) for r in (hit, quiet)]
    assert done[0] == done[1] > 0
    assert watching.poll() is None  # over both jobs, and while nobody listened
    lines = [line for line in place.said("watching").splitlines() if line.startswith("{")]  # gRPC says things, too
    waited = [json.loads(line)["queue"]["waiting"] for line in lines]
    assert any("0002-decentral_train" in each for each in waited)
    assert waited[-1] == []
    for each in providers:  # they wait for more
        assert each.poll() is None
        each.send_signal(signal.SIGTERM)
    assert [each.wait(20) for each in providers] == [0, 0], place.said("p0") + place.said("p1")
    assert main(["ledger", str(place.results), "--json"]) == 0
    summed = json.loads(capsys.readouterr().out)
    assert len(summed["runs"]) == 2
    assert sum(each["tflop"] for each in summed["providers"].values()) == pytest.approx(2 * done[0])


def test_jobs_are_taken_in_order_the_one_under_way_first_and_what_is_wrong_with_one_stays_with_it(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = tmp_path / "jobs"
    for path, text in {
        "20-b.txt": "+exp=decentral_train train.stpes=3",
        "10-a.txt": "+exp=lorafa_minilm",
        "30-c.txt": "+exp=decentral_train 'task.faults=[",
        "running/40-d.txt": "+exp=decentral_train\n  # with a comment\n'task.planes=[cobol]'\n",
        "failed/20-b.txt": "",
        ".hidden.txt": "",
        "notes.md": "",
    }.items():
        (folder / path).parent.mkdir(parents=True, exist_ok=True)
        (folder / path).write_text(text)
    Queue(folder, f"127.0.0.1:{port()}", ["task.token_file=token"], until_empty=True).run()
    assert capsys.readouterr().out.splitlines() == [
        "40-d: failed: task.planes=cobol: must be one of torch, torch_compiled, onnx",
        "10-a: failed: task.kind=train: must be one that providers do, e.g. of +exp=decentral_train",
        "20-b: failed: train.stpes: no such setting; did you mean train.steps or train.seed or train.loss?",
        "30-c: failed: No closing quotation",
    ]
    names = [path.name for path in queued.waiting(folder / "failed")]
    assert names == ["10-a.txt", "20-b.2.txt", "20-b.txt", "30-c.txt", "40-d.txt"]
    assert (
        (folder / "failed" / "40-d.txt")
        .read_text()
        .endswith("\n# failed: task.planes=cobol: must be one of torch, torch_compiled, onnx\n")
    )
    assert not queued.waiting(folder)


def test_one_broker_has_a_folder(tmp_path: Path) -> None:
    with open(tmp_path / ".lock", "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        with pytest.raises(BlockingIOError, match="another broker runs the jobs there"):
            Queue(tmp_path, "127.0.0.1:7077", []).run()


def test_a_port_that_another_has_ends_the_queue_and_the_job_waits(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("llmsys.decentral.job_queue.FREE_S", 0.0)
    descriptor, taken = listen("127.0.0.1")
    (tmp_path / "1.txt").write_text("+exp=decentral_train")
    try:
        with pytest.raises(OSError, match=f"--listen 127.0.0.1:{taken}: Address already in use"):
            Queue(tmp_path, f"127.0.0.1:{taken}", [], until_empty=True).run()
    finally:
        os.close(descriptor)
    assert [path.name for path in (tmp_path / "running").iterdir()] == ["1.txt"]


def test_what_is_submitted_is_read_as_it_was_said(tmp_path: Path) -> None:
    words = [*SMALL, "task.faults=[p1 SIGKILL 3]", "model.weights=random", "smoke=true"]
    path = submit(tmp_path / "jobs", words, "05-urgent")
    assert path.name == "05-urgent.txt"
    assert queued.words_of(path.read_text()) == words
    with pytest.raises(FileExistsError, match=r"05-urgent\.txt: is there already"):
        submit(tmp_path / "jobs", words, "05-urgent")
    assert submit(tmp_path / "jobs", words).name == "0006-decentral_train.txt"


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["submit", "jobs", "+exp=decentral_tran"], "exp=decentral_tran: no such choice"),
        (["submit", "jobs", "+exp=lorafa_minilm"], "task.kind=train: must be one that providers do"),
        (["submit", "jobs", "+exp=decentral_train", "dispatch=inline"], "dispatch=inline: must be process"),
        (["submit", "jobs", "+exp=decentral_train", "task.private=[1,1]"], "task.trusted_token_file: empty"),
        (["submit", "--", "jobs", "-m", "+exp=decentral_train"], "-m: a job is one run"),
        (["broker", "--credentials", "."], "broker: takes an experiment, +exp=decentral_train ..., or --queue FOLDER"),
        (["broker", "--credentials", ".", "--queue", "jobs", "--listen", "127.0.0.1:0"], "--listen 127.0.0.1:0: must"),
    ],
)
def test_a_mistake_is_one_line_and_nothing_waits(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], words: list[str], said: str
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "token").touch()
    assert main(words) == 1
    (line,) = capsys.readouterr().err.strip().splitlines()
    assert said in line
    assert not [*tmp_path.rglob("*.txt")]
