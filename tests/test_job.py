"""Claims about identity: what makes a run another run, and what a record is."""

from __future__ import annotations

import copy
import json
import os
import subprocess
from pathlib import Path

import pytest

from llmsys import compose, identity, job
from llmsys.files import MACHINE
from llmsys.job import Record

CONFIG = compose.compose(["train.threads=1"])


def identifier(device_name: str = "a CPU", content: str = "", **changes: object) -> str:
    config = copy.deepcopy(CONFIG)
    for key, value in changes.items():
        group, _, name = key.partition("__")
        if name:
            config[group][name] = value
        else:
            config[group] = value
    return identity.run_id(config, device_name=device_name, content={"data": content, "weights": ""})


def test_equal_settings_are_one_run() -> None:
    assert identifier() == identifier()
    assert len(identifier()) == 12


@pytest.mark.parametrize(
    "change",
    [
        {"train__world": 2},
        {"train__seed": 1},
        {"train__threads": 2},
        {"device_name": "another CPU"},
        {"hardware__device": "cuda"},
        {"content": "other bytes"},
        {"dispatch__memory_gib": 1.0},
        {"method": {"kind": "lora_peft", "r": 8}},
        {"repeat": 1},
    ],
    ids=str,
)
def test_what_can_change_the_result_makes_another_run(change: dict[str, object]) -> None:
    assert identifier(**change) != identifier()  # type: ignore[arg-type]


@pytest.mark.parametrize(
    "change",
    [
        {"dispatch__kind": "inline"},
        {"dispatch__timeout_s": 5.0},
        {"tracker__kind": "wandb"},
        {"results": "elsewhere"},
        {"reuse": "never"},
        {"force": True},
        {"smoke": ["a=b"]},
        {"command": ["train.steps=5"]},
        {"sweep": {"order": "shuffled"}},
    ],
    ids=str,
)
def test_where_it_runs_and_who_is_told_does_not(change: dict[str, object]) -> None:
    assert identifier(**change) == identifier()  # type: ignore[arg-type]


def test_a_record_from_before_there_were_sweeps_and_repeats_is_of_the_same_run() -> None:
    earlier = {key: value for key, value in CONFIG.items() if key not in ("sweep", "repeat")}
    assert identity.run_id(earlier, device_name="a CPU", content={"data": "", "weights": ""}) == identifier()


def test_the_content_of_a_local_file_counts(tmp_path: Path) -> None:
    path = tmp_path / "data.jsonl"
    ids = []
    for output in ("one", "two"):
        path.write_text(json.dumps({"instruction": "say", "input": "", "output": output}) + "\n")
        ids.append(job.make(compose.compose(["data=jsonl", f"data.path={path}"])).run_id)
    assert ids[0] != ids[1]


def test_the_content_of_local_weights_counts(tmp_path: Path) -> None:
    torch = pytest.importorskip("torch")
    from safetensors.torch import save_file

    ids = []
    for value in (0.0, 1.0):
        save_file({"w": torch.full((4,), value)}, tmp_path / "model.safetensors")
        ids.append(job.make(compose.compose([f"model.weights={tmp_path}"])).run_id)
    assert ids[0] != ids[1]


def test_device_and_threads_are_resolved_before_the_id() -> None:
    made = job.make(compose.compose([]))
    assert made.config["hardware"]["device"] in ("cpu", "cuda")
    assert made.config["train"]["threads"] >= 1


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["method.r=33"], r"method\.r=33: exceeds the width of model\.layers\.0\.self_attn\.k_proj, which is 64 x 32"),
        (["method.targets=[o_proj,wq]"], r"method\.targets=wq: no such linear layer in the blocks; there are .*"),
        (["method=lora_peft", "method.targets=[wq]"], r"method\.targets=wq: no such linear layer .*"),
        (["method.bias=lora_only"], r"method\.bias=lora_only: no layer in method\.targets has a bias"),
    ],
)
def test_adapters_that_the_model_s_shape_has_no_room_for_are_refused_before_there_is_a_folder(
    tmp_path: Path, words: list[str], message: str
) -> None:
    """And before data is read, though there is none; where the layer is not meant, or r is its width, it is made."""
    shape = ["method=lorafa", "model.num_kv_heads=2", f"results={tmp_path / 'results'}"]
    with pytest.raises(ValueError, match=f"^{message}$"):
        job.make(compose.compose([*shape, "data=jsonl", f"data.path={tmp_path / 'none.jsonl'}", *words]))
    assert list(tmp_path.iterdir()) == []
    job.make(compose.compose([*shape, "method.r=32"]))
    job.make(compose.compose([*shape, "method.r=64", "method.targets=[o_proj]"]))


def test_a_record_survives_the_file_and_refuses_what_it_does_not_know(tmp_path: Path) -> None:
    record = Record(name="n", run_id="r", task="train", status="ok", summary={"loss": 1.5}, samples={"step_ms": [1.0]})
    record.write(tmp_path)
    assert Record.read(tmp_path) == record
    assert Record.read(tmp_path / "elsewhere") is None
    with pytest.raises(ValueError, match="unknown fields"):
        Record.from_json('{"schema": 1, "bogus": 0}')
    with pytest.raises(ValueError, match="status=fine"):
        Record(name="n", run_id="r", task="train", status="fine")
    (tmp_path / "record.json").write_text("{")
    with pytest.raises(ValueError, match=r"record\.json"):
        Record.read(tmp_path)


def test_what_a_kill_left_beside_a_record_goes_with_the_next_one(tmp_path: Path) -> None:
    with subprocess.Popen(["true"]) as gone:
        pass
    ours, elsewhere = f".record.json.{MACHINE}", f".record.json.{MACHINE}x.{gone.pid}"  # may be alive over there
    kept = {f"{ours}.bad", f"{ours}.{os.getppid()}", f"{ours}.{10**30}", elsewhere}
    for name in (f"{ours}.{gone.pid}", f"{ours}.{os.getpid()}", *kept):
        (tmp_path / name).write_text("{")
    Record(name="n", run_id="r", task="train", status="ok").write(tmp_path)
    assert set(os.listdir(tmp_path)) == {"record.json", *kept}


def test_the_committed_example_of_schema_1_is_read_and_written_alike() -> None:
    """Records outlive the code: this file was written by the first version of it and must stay readable."""
    text = (Path(__file__).parent / "record_schema_1.json").read_text()
    record = Record.from_json(text)
    assert json.loads(record.to_json()) == json.loads(text)
    types = {key: type(value).__name__ for key, value in json.loads(text).items()}
    assert types["summary"] == types["samples"] == types["files"] == types["env"] == types["config"] == "dict"
    assert record.status == "ok"
    assert all(isinstance(value, int | float) for value in record.summary.values())
    assert all(isinstance(v, int | float) for values in record.samples.values() for v in values)


def test_a_nan_never_gets_into_a_record() -> None:
    with pytest.raises(ValueError, match="Out of range"):
        Record(name="n", run_id="r", task="train", status="ok", summary={"loss": float("nan")}).to_json()
