"""Claims about the metrics file and its mirrors on real runs, in real processes, with real faults."""

from __future__ import annotations

import contextlib
import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from llmsys import compose, job, runner
from llmsys.dispatch import process
from llmsys.dispatch.child import descendants
from llmsys.errors import MissingPackage
from llmsys.job import Job, Record
from llmsys.track import jsonl, wandb_log
from llmsys.track.wandb import tags

TINY = ("train.length=16", "data.num_examples=40", "train.threads=1", "profile.probe=false", "train.save_final=false")


def test_rows_are_cut_back_to_a_step_and_a_torn_line_is_left_out(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    lines = jsonl.JsonLines(path)
    for step in range(1, 5):
        lines.row({"step": step})
    with open(path, "a") as file:
        file.write('{"step": 5, "lo')
    assert [row["step"] for row in jsonl.read(path)] == [1, 2, 3, 4]
    lines.trim(2)
    lines.row({"step": 3})
    assert [row["step"] for row in jsonl.read(path)] == [1, 2, 3]
    assert lines.count(2) == 2


def test_a_broken_line_in_the_middle_is_an_error_with_its_number(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    path.write_text('{"step": 0}\n{"st\n{"step": 2}\n')
    with pytest.raises(ValueError, match=r"metrics\.jsonl:2"):
        jsonl.read(path)


@pytest.fixture(autouse=True)
def _no_account(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """No key, no settings and no mode of whoever runs the tests."""
    for name in [name for name in os.environ if name.startswith("WANDB_")]:
        monkeypatch.delenv(name)
    monkeypatch.setenv("HOME", str(tmp_path))


def made(results: Path, *overrides: str) -> Job:
    return job.make(compose.compose([f"results={results}", *TINY, *overrides]))


def run(one: Job, progress: Callable[[dict[str, Any]], None] = lambda values: None) -> Record:
    """In a process of its own; `progress` hears of each step in this one."""
    out = Path(one.out)
    out.mkdir(parents=True, exist_ok=True)
    with open(out.parents[1] / "lock", "w") as lock:
        return process.run(one, progress, lock.fileno())


def offline(one: Job) -> Path:
    """The folder of its W&B run."""
    (found,) = Path(one.out).glob(f"wandb/offline-run-*-{one.run_id}")
    return found


def kept(one: Job) -> dict[str, list[Any]]:
    """What W&B has kept of it, by kind."""
    found: dict[str, list[Any]] = {}
    for record in wandb_log.records(offline(one) / f"run-{one.run_id}.wandb"):
        kind = record.WhichOneof("record_type")
        found.setdefault(kind, []).append(getattr(record, kind))
    return found


def values(items: Any) -> dict[str, str]:
    return {item.key or "/".join(item.nested_key): item.value_json for item in items}


def steps(one: Job) -> list[int]:
    """Of the local rows, one a step, and one of the evaluation."""
    return [row["step"] for row in jsonl.read(Path(one.out) / "metrics.jsonl")]


@pytest.mark.slow
def test_both_mirrors_have_all_of_a_run_without_key_or_network(results: Path) -> None:
    """And the offline run is one that `wandb sync` takes: without a key, or where no server answers, it says so and
    leaves the folder alone."""
    one = made(results, "tracker=both", "train.steps=8", "train.eval_every=4")
    record = run(one)
    assert record.status == "ok", record.error
    assert "tracker" not in record.notes

    wandb = kept(one)
    (said,) = wandb["run"]
    assert (said.project, said.run_group, said.job_type) == ("llmsys", "scratch", "train")
    assert (said.run_id, said.display_name) == (one.run_id, f"scratch-{one.run_id}")
    assert list(said.tags) == tags(one.config, record.env)
    assert {item.key for item in said.config.update} >= {*one.config, "env"}
    first, *rows = [values(row.item) for row in wandb["history"]]
    assert any(key.startswith("modules/") for key in first)
    assert [int(row["step"]) for row in rows] == steps(one) == [1, 2, 3, 4, 4, 5, 6, 7, 8, 8]
    summary = {key: value for part in wandb["summary"] for key, value in values(part.update).items()}
    assert float(summary["step_ms_p50"]) == record.summary["step_ms_p50"]
    assert any("cpu" in item.key for part in wandb["stats"] for item in part.item)

    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(Path(one.out) / "tensorboard"))
    events.Reload()
    assert [event.step for event in events.Scalars("step_ms")] == list(range(1, 9))
    (accuracy,) = events.Scalars("summary/step_ms_p50")
    assert accuracy.value == pytest.approx(record.summary["step_ms_p50"], rel=1e-6)
    (text,) = events.Tensors("modules/text_summary")
    table = [line.strip("| ").split(" | ") for line in text.tensor_proto.string_val[0].decode().splitlines()]
    assert table[0] == ["module", "type", "parameters", "trainable_parameters"]
    assert sum(int(line[2]) for line in table[2:]) == record.summary["total_params"]
    assert sum(int(line[3]) for line in table[2:]) == record.summary["trainable_params"]
    assert b"hidden_size" in events.Tensors("config/text_summary")[0].tensor_proto.string_val[0]

    folder = offline(one)
    before = {path: path.read_bytes() for path in folder.rglob("*") if path.is_file() and "logs" not in path.parts}
    sync = [sys.executable, "-m", "wandb", "sync", "--yes"]
    listed = subprocess.run([*sync, "--dry-run", str(folder)], capture_output=True, text=True, check=False)
    assert f"run-{one.run_id}.wandb" in listed.stdout + listed.stderr
    account = {"WANDB_API_KEY": "a" * 40, "WANDB_BASE_URL": "http://127.0.0.1:9"}
    quick = {"WANDB_X_GRAPHQL_RETRY_MAX": "1", "WANDB_X_GRAPHQL_RETRY_WAIT_MAX_SECONDS": "1"}
    for variables, error in ({}, "No API key configured"), ({**account, **quick}, "connection refused"):
        env = {**os.environ, **variables}
        done = subprocess.run([*sync, str(folder)], capture_output=True, text=True, check=False, cwd=results, env=env)
        assert error in done.stderr
    assert {path: path.read_bytes() for path in before} == before


@pytest.mark.slow
@pytest.mark.parametrize(
    ("number", "limits", "said"),
    [
        (signal.SIGKILL, (), "told no more: "),
        (signal.SIGSTOP, ("tracker.finish_s=1",), "tracker.finish_s"),
    ],
)
def test_a_service_of_wandb_that_is_killed_or_stopped_harms_no_run(
    results: Path, number: int, limits: tuple[str, ...], said: str
) -> None:
    """In the middle of a run. Whoever waits for a stopped service waits for ever; here no longer than it is said. None
    is left behind, and TensorBoard is told to the end."""
    one = made(results, "tracker=both", "train.steps=150", *limits)
    struck: list[int] = []

    def strike(values: dict[str, Any]) -> None:
        if values.get("step", 0) >= 5 and not struck:
            for pid in descendants(os.getpid()):
                with contextlib.suppress(FileNotFoundError):
                    if b"wandb-core" in Path(f"/proc/{pid}/cmdline").read_bytes():
                        os.kill(pid, number)
                        struck.append(pid)

    record = run(one, strike)
    assert struck
    assert record.status == "ok", record.error
    assert record.notes["tracker"].startswith("WandB: ")
    assert said in record.notes["tracker"]
    assert "TensorBoard" not in record.notes["tracker"]
    assert steps(one) == [*range(1, 151), 150]
    assert Record.read(Path(one.out)) == record
    assert "the tracker WandB" in (Path(one.out) / "log.txt").read_text()
    assert not wandb_log.complete(offline(one) / f"run-{one.run_id}.wandb")
    for pid in struck:
        stat = Path(f"/proc/{pid}/stat")
        assert not stat.exists() or stat.read_text().rpartition(")")[2].split()[0] == "Z"

    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(Path(one.out) / "tensorboard"), size_guidance={"scalars": 0})
    events.Reload()
    assert len(events.Scalars("loss")) == 150


def namespaces() -> bool:
    """Whether this machine lets a process mount a file system of its own."""
    return (
        shutil.which("unshare") is not None
        and subprocess.run(["unshare", "-rm", "true"], check=False, capture_output=True).returncode == 0
    )


@pytest.mark.slow
@pytest.mark.skipif(not namespaces(), reason="a small file system needs user and mount namespaces, which are forbidden")
@pytest.mark.parametrize("size", ["16k", "128k"])
def test_a_disk_that_is_full_for_the_mirrors_alone_harms_no_run(results: Path, size: str) -> None:
    """16 KiB are full before the first row; when 128 KiB are, W&B's service does not say so, and writes on."""
    one = made(results, "tracker=both", "train.steps=600")
    code = (
        "import sys; from pathlib import Path; sys.path.insert(0, sys.argv[1]); import test_track\n"
        "record = test_track.run(test_track.made(Path(sys.argv[2]), *sys.argv[3:]))\n"
        "print(record.status, record.notes.get('tracker'))\n"
    )
    mounts = []
    for name in ("wandb", "tensorboard"):
        folder = Path(one.out) / name
        folder.mkdir(parents=True)
        mounts.append(f'mount -t tmpfs -o size={size} tmpfs "{folder}"')
    script = f'{" && ".join(mounts)} && exec "{sys.executable}" -c "$0" "$@"'
    words = (str(Path(__file__).parent), str(results), "tracker=both", "train.steps=600")
    done = subprocess.run(
        ["unshare", "-rm", "sh", "-c", script, code, *words], capture_output=True, text=True, check=False
    )
    status, _, said = done.stdout.strip().partition(" ")
    assert status == "ok", done.stderr[-2000:]
    assert "WandB: failed" in said
    assert "TensorBoard: failed" in said
    assert steps(one) == [*range(1, 601), 600]


def test_a_mirror_that_cannot_come_up_harms_no_run(
    results: Path, llmsys: Callable[..., subprocess.CompletedProcess[str]]
) -> None:
    """Where its folder would be there is a file. In the process that has asked: its exit does not wait either."""
    one = job.make(compose.compose([f"results={results}", "+exp=bench_predict", "tracker=both"]))
    Path(one.out).mkdir(parents=True)
    for name in ("wandb", "tensorboard"):
        (Path(one.out) / name).touch()
    done = llmsys("+exp=bench_predict", "tracker=both")
    assert done.returncode == 0, done.stderr
    assert "Traceback" not in done.stderr
    record = Record.read(Path(one.out))
    assert record is not None
    assert record.status == "ok"
    assert record.notes["tracker"].count("told no more: NotADirectoryError") == 2
    assert (Path(one.out) / "log.txt").read_text().count("the tracker") == 2


@pytest.mark.parametrize(
    ("account", "why"),
    [
        pytest.param({}, "No API key", marks=pytest.mark.slow),
        ({"WANDB_API_KEY": "a" * 40, "WANDB_BASE_URL": "http://127.0.0.1:9", "WANDB_INIT_TIMEOUT": "1"}, "refused"),
    ],
)
def test_where_wandb_cannot_be_online_it_is_offline_and_that_is_said(
    results: Path, llmsys: Callable[..., subprocess.CompletedProcess[str]], account: dict[str, str], why: str
) -> None:
    one = job.make(compose.compose([f"results={results}", "+exp=bench_predict", "tracker=wandb"]))
    done = llmsys("+exp=bench_predict", "tracker=wandb", WANDB_MODE="online", **account)
    assert done.returncode == 0, done.stderr
    record = Record.read(Path(one.out))
    assert record is not None
    assert record.notes["tracker"].startswith("WandB: offline, since mode=online did not come up")
    assert why in record.notes["tracker"]
    assert wandb_log.complete(offline(one) / f"run-{one.run_id}.wandb")


def test_variables_of_the_environment_win_over_the_config(
    results: Path, llmsys: Callable[..., subprocess.CompletedProcess[str]], tmp_path: Path
) -> None:
    given = {"WANDB_PROJECT": "mine", "WANDB_RUN_GROUP": "ours", "WANDB_TAGS": "a,b", "WANDB_DIR": str(tmp_path)}
    done = llmsys("+exp=bench_predict", "tracker=wandb", "tracker.project=other", **given)
    assert done.returncode == 0, done.stderr
    (file,) = tmp_path.glob("wandb/offline-run-*/run-*.wandb")
    (said,) = [record.run for record in wandb_log.records(file) if record.HasField("run")]
    assert (said.project, said.run_group, list(said.tags)) == ("mine", "ours", ["a", "b"])


def test_a_resumed_run_hides_what_an_earlier_attempt_wrote_of_the_same_steps(results: Path) -> None:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    from llmsys import schema
    from llmsys.track.tensorboard import TensorBoard

    one = made(results, "tracker=tensorboard")
    for attempt, first in enumerate((1, 3)):
        sink = TensorBoard(schema.Tracker(), one, {})
        sink.start()
        for step in range(first, 6):
            sink.row({"step": step, "loss": float(attempt), "spike": True, "grad_norm": None})
        sink.finish(Record(name="n", run_id="r", task="train", status="ok", config=one.config))
    events = EventAccumulator(str(Path(one.out) / "tensorboard"))
    events.Reload()
    assert [(event.step, event.value) for event in events.Scalars("loss")] == [(1, 0), (2, 0), (3, 1), (4, 1), (5, 1)]
    assert "grad_norm" not in events.Tags()["scalars"]


@pytest.mark.slow
def test_the_times_of_modules_are_a_table_too_where_a_run_has_measured_them(results: Path) -> None:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    words = [f"results={results}", "+exp=bench_modules", "smoke=true", "tracker=tensorboard", "train.threads=1"]
    one = job.make(compose.compose(words))
    record = run(one)
    assert record.status == "ok", record.error
    events = EventAccumulator(str(Path(one.out) / "tensorboard"))
    events.Reload()
    (text,) = events.Tensors("module_times/text_summary")
    _, _, *lines = text.tensor_proto.string_val[0].decode().splitlines()
    assert {"modules/{}/{}_ms".format(*line.strip("| ").split(" | ")) for line in lines} == {
        key for key in record.samples if key.startswith("modules/")
    }


def test_a_tag_that_is_too_long_for_wandb_is_left_out() -> None:
    config = {
        "name": "lorafa_llama_6m",
        "task": {"kind": "train"},
        "method": {"kind": "lorafa"},
        "hardware": {"device": "cuda"},
    }
    env = {"device_name": "N" * 65, "git_sha": "0123456789abcdef"}
    assert tags(config, env) == ["lorafa", "train", "cuda", "01234567"]


@pytest.mark.parametrize("name", ["wandb", "tensorboard"])
def test_a_missing_tracker_package_is_named_with_its_extra_before_anything_starts(
    results: Path, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    one = made(results, f"tracker={name}")
    monkeypatch.setitem(sys.modules, name, None)
    with pytest.raises(MissingPackage, match=rf"tracker={name}: .*llmsys\[{name}\]"):
        made(results, "tracker=both")
    record = runner.run(one)  # on another machine than the one that has made the job
    assert (record.status, record.reason) == ("failed", "missing package")
    assert f"llmsys[{name}]" in record.error


def test_a_mode_that_wandb_has_not_is_refused_before_anything_starts(
    results: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("WANDB_MODE", "onlin")
    with pytest.raises(ValueError, match="WANDB_MODE=onlin: must be one of offline, online"):
        made(results, "tracker=wandb")


def test_only_its_own_module_imports_a_tracker() -> None:
    """So that nobody pays for one who has not asked for it."""
    code = "import sys, llmsys.track, llmsys.runner; print({'wandb', 'tensorboard'} & sys.modules.keys())"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "set()"
