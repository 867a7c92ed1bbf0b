"""Claims about the metrics file and its mirror."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from llmsys import compose, job, runner
from llmsys.job import Record
from llmsys.track import Mirror, jsonl


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


def test_wandb_offline_leaves_a_run_folder_without_key_or_network(
    results: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("wandb")
    monkeypatch.delenv("WANDB_API_KEY", raising=False)
    monkeypatch.delenv("WANDB_MODE", raising=False)
    short = ("train.steps=2", "train.length=32", "data.num_examples=40", "train.threads=1", "profile.warmup=0")
    made = job.make(compose.compose([f"results={results}", "tracker=wandb", *short]))
    from llmsys.dispatch import process

    Path(made.out).mkdir(parents=True)
    with open(results / "lock", "w") as lock:
        record = process.run(made, lambda values: None, lock.fileno())
    assert record.status == "ok", record.error
    runs = list((Path(made.out) / "wandb").glob(f"offline-run-*-{made.run_id}/run-{made.run_id}.wandb"))
    assert len(runs) == 1
    assert runs[0].stat().st_size > 0


def test_a_mirror_that_fails_harms_no_run_and_is_told_no_more(caplog: pytest.LogCaptureFixture) -> None:
    class Broken:
        calls = 0

        def row(self, row: dict[str, Any]) -> None:
            self.calls += 1
            raise ConnectionError("no network")

        def finish(self, record: Record) -> None:
            self.calls += 1

    sink = Broken()
    mirror = Mirror(sink)
    mirror.row({"step": 1})
    mirror.row({"step": 2})
    mirror.finish(Record(name="n", run_id="r", task="train", status="ok"))
    assert sink.calls == 1
    assert "no network" in caplog.text


def test_a_missing_tracker_package_is_named_with_its_extra(results: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import sys

    monkeypatch.setitem(sys.modules, "wandb", None)
    made = job.make(compose.compose([f"results={results}", "tracker=wandb", "train.steps=1"]))
    record = runner.run(made)
    assert record.status == "failed"
    assert "llmsys[wandb]" in record.error
