"""Claims about a mirror that fails, blocks or never comes up: the run is told nothing of it but in words."""

from __future__ import annotations

import threading
from typing import Any

import pytest

from llmsys import schema, track
from llmsys.job import Record
from llmsys.track import Mirror

RECORD = Record(name="n", run_id="r", task="train", status="ok")


class Told:
    """A sink that notes what it is told, and fails or blocks at the call named."""

    note = ""

    def __init__(self, fails: str = "", blocks: str = "") -> None:
        self.fails, self.blocks = fails, blocks
        self.calls: list[str] = []
        self.free = threading.Event()
        self.abandoned = 0

    def _told(self, call: str) -> None:
        self.calls.append(call)
        if call == self.fails:
            raise ConnectionError("no network")
        if call == self.blocks:
            self.free.wait()
            raise ConnectionError("the connection was cut")

    def start(self) -> None:
        self._told("start")

    def table(self, *_: Any) -> None:
        self._told("table")

    def row(self, row: dict[str, Any]) -> None:
        self._told(f"row {row['step']}")

    def finish(self, record: Record) -> None:
        self._told("finish")

    def abandon(self) -> None:
        self.abandoned += 1
        self.free.set()


def tell(sink: Told, **limits: float) -> dict[str, str]:
    """A whole run's story to a mirror of `sink`; what the record is to say."""
    mirror = Mirror(sink, schema.Tracker(**limits))  # type: ignore[arg-type]
    mirror.started()
    mirror.table("modules", ["name"], [["a"]])
    row = {"step": 1}
    mirror.row(row)
    row["step"] = 2
    mirror.row(row)
    return track.close([mirror], RECORD)


def test_a_sink_is_told_all_in_order_and_each_row_as_it_was() -> None:
    sink = Told()
    assert tell(sink) == {}
    assert sink.calls == ["start", "table", "row 1", "row 2", "finish"]
    assert sink.abandoned == 0


@pytest.mark.parametrize("fails", ["start", "table", "row 1", "finish"])
def test_a_sink_that_fails_is_told_no_more_and_the_record_says_so(fails: str, caplog: pytest.LogCaptureFixture) -> None:
    sink = Told(fails=fails)
    said = tell(sink)["tracker"]
    assert said == "Told: failed and is told no more: ConnectionError: no network"
    assert sink.calls[-1] == fails
    assert sink.abandoned == 1
    assert caplog.text.count("no network") == 1


@pytest.mark.parametrize(("blocks", "key"), [("start", "start_s"), ("table", "start_s"), ("row 1", "finish_s")])
def test_a_sink_that_blocks_is_left_at_its_deadline_and_let_go(blocks: str, key: str) -> None:
    """Letting go makes the blocked call raise; what is told is the deadline, not what came of letting go."""
    sink = Told(blocks=blocks)
    said = tell(sink, **{key: 0.05})["tracker"]
    assert f"tracker.{key}" in said
    assert "cut" not in said
    assert sink.calls[-1] == blocks
    assert sink.abandoned >= 1


def test_rows_wait_for_a_sink_that_is_behind_but_not_without_a_limit(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("llmsys.track.mirror.BEHIND", 3)
    sink = Told(blocks="row 0")
    mirror = Mirror(sink, schema.Tracker())
    mirror.started()
    for step in range(6):
        mirror.row({"step": step})
    assert "3 rows behind" in track.close([mirror], RECORD)["tracker"]


def test_what_a_sink_has_to_say_although_it_works_is_in_the_record() -> None:
    sink = Told()
    sink.note = "offline"
    assert tell(sink) == {"tracker": "Told: offline"}
