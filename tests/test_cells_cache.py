"""Claims about loading many records: a frame is what pandas makes of their rows, cached, half stale or read anew."""

from __future__ import annotations

import json
import logging
import os
import random
import shutil
import subprocess
import sys
from pathlib import Path
from types import FrameType
from typing import Any

import pandas
import pytest
from pandas.testing import assert_frame_equal

from llmsys import cells, cells_cache, files, record_files, results
from llmsys.job import Record

COMMITTED = Path(__file__).parents[1] / "benchmarks" / "records"
FEW = ("lorafa_minilm", "bench_engines", "compress_iteration", "decentral_plan", "bench_prune", "lorafa_ledger")
"""Of every kind: trainings, measurements, plans, scripts, and tables of their own."""


def reference(root: Path) -> pandas.DataFrame:
    """What pandas makes of the rows as dicts, in the order of columns that frames have."""
    rows = [results.row(record) for record in results.read(root)]
    lines = [
        {key: value for key, value in row.items() if key != "config"}
        | {f"config.{key}": value for key, value in row["config"].items()}
        for row in rows
    ]
    frame = pandas.DataFrame(lines)
    return frame[cells.ordered(set(frame.columns))]


def same(one: pandas.DataFrame, other: pandas.DataFrame) -> None:
    """Equal to the last type: of a column, and of each object within one."""
    assert_frame_equal(one, other, check_exact=True)
    for key in [key for key in one if one[key].dtype.kind == "O"]:
        assert list(map(repr, one[key])) == list(map(repr, other[key])), key


def older(root: Path) -> None:
    """Makes records look as if written an hour ago: what is younger than two seconds is not trusted to be unchanged."""
    for path in root.rglob("record.json"):
        stat = path.stat()
        os.utime(path, ns=(stat.st_atime_ns, stat.st_mtime_ns - 3600 * 10**9))


@pytest.fixture
def root(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setattr(cells_cache, "LEAST", 1)
    monkeypatch.setenv("LLMSYS_CACHE", str(tmp_path / "cache"))
    folder = tmp_path / "results"
    for name in FEW:
        shutil.copytree(COMMITTED / name, folder / name)
    older(folder)
    return folder


@pytest.fixture
def reads(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The files of the records that are read."""
    read, seen = record_files.record, []

    def counted(path: str, *, samples: bool) -> Record | None:
        seen.append(path)
        return read(path, samples=samples)

    monkeypatch.setattr(record_files, "record", counted)
    return seen


def test_a_frame_of_all_published_records_is_what_pandas_makes_of_their_rows() -> None:
    same(results.load(COMMITTED, cache=False), reference(COMMITTED))


def test_a_cached_frame_is_the_uncached_one_and_reads_no_record(root: Path, reads: list[str]) -> None:
    fresh = results.load(root)
    assert (root / cells_cache.NAME).exists()
    reads.clear()
    same(results.load(root), fresh)
    assert reads == []
    same(fresh, reference(root))


@pytest.mark.parametrize("seed", range(4))
def test_after_any_changes_only_stale_records_are_read_and_the_frame_is_the_uncached_one(
    root: Path, reads: list[str], seed: int
) -> None:
    """Records go, come and change, and with them the types of columns: ints beside floats, None, lists, text."""
    draw = random.Random(seed)
    odd: list[Any] = [None, 1, 1.0, True, "1", [1, "a", None], {"a": [1]}, float("nan"), 2**70, 2**63 - 1, ""]
    for turn in range(3):
        results.load(root)
        paths = sorted(root.rglob("record.json"))
        gone, changed = draw.sample(paths, 2), draw.sample(paths, 3)
        stale = {str(path) for path in changed} - {str(path) for path in gone}
        for path in changed:
            values = json.loads(path.read_text())
            values["config"] |= {f"odd{draw.randrange(4)}": draw.choice(odd) for _ in range(4)}
            values["summary"] |= {"count": draw.choice([1, 1.5, 2**60 + 1]), f"only_{turn}": draw.choice([1, 0.5])}
            path.write_text(json.dumps(values, indent=draw.choice([1, None])) + "\n")
        for number in range(2):
            new = root / "added" / f"{turn}{number}"
            shutil.copytree(draw.choice(paths).parent, new)
            stale.add(str(new / "record.json"))
        for path in gone:
            path.unlink()
        older(root / "added")
        for name in {path.parent for path in changed}:
            older(name)
        reads.clear()
        found = results.load(root)
        assert set(reads) >= stale
        assert len(reads) <= len(stale) + 4, "nothing but what changed, and what was added before and made older since"
        same(found, results.load(root, cache=False))
        same(found, reference(root))


def test_half_of_a_surrogate_pair_stays_as_it_is(root: Path) -> None:
    """JSON can hold it, and pandas' texts cannot."""
    path = root / "half" / "record.json"
    path.parent.mkdir()
    Record(name="\ud800", run_id="b", task="train", status="ok").write(path.parent)
    older(path.parent)
    for _ in range(2):
        assert "\ud800" in list(results.load(root)["experiment"])


def test_the_code_that_makes_cells_is_what_the_cache_goes_by() -> None:
    """Of all of this package that is called on the way from a file to cells."""
    package, called = Path(cells.__file__).parent, set()

    def heard(frame: FrameType, event: str, _: object) -> None:
        if event == "call" and Path(frame.f_code.co_filename).is_relative_to(package):
            called.add(Path(frame.f_code.co_filename).relative_to(package).with_suffix("").as_posix())

    sys.setprofile(heard)
    try:
        cells_cache.load(COMMITTED, cache=False)
    finally:
        sys.setprofile(None)
    assert {"rows", "job", "schema/compress"} <= called <= set(cells_cache.MAKERS)


def test_other_code_makes_all_of_it_stale(root: Path, reads: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    results.load(root)
    reads.clear()
    monkeypatch.setattr(cells_cache, "code", lambda: "of another version")
    results.load(root)
    assert len(reads) == len(record_files.find(root))


def test_a_record_of_this_moment_is_read_again_as_it_may_yet_change_within_one_tick_of_the_clock(
    root: Path, reads: list[str]
) -> None:
    path = next(iter(sorted(root.rglob("record.json"))))
    path.touch()
    results.load(root)
    reads.clear()
    results.load(root)
    assert reads == [str(path)]


@pytest.mark.parametrize("damage", ["cut", "flipped", "empty", "other"])
def test_a_damaged_cache_is_said_and_done_without(
    root: Path, damage: str, caplog: pytest.LogCaptureFixture, reads: list[str]
) -> None:
    fresh = results.load(root)
    path = root / cells_cache.NAME
    data = bytearray(path.read_bytes())
    if damage == "flipped":
        data[len(data) // 3] ^= 255
    other = b"PAR1 of another program"
    path.write_bytes({"cut": data[: len(data) // 2], "flipped": data, "empty": b"", "other": other}[damage])
    reads.clear()
    with caplog.at_level(logging.WARNING, "llmsys"):
        same(results.load(root), fresh)
    assert len(reads) == len(fresh)
    assert [record.getMessage().count("\n") for record in caplog.records] == [0]
    assert str(path) in caplog.text
    reads.clear()
    same(results.load(root), fresh)
    assert reads == [], "it has been written anew"


def test_where_records_cannot_be_written_the_cache_lies_in_the_cache_folder(
    root: Path, reads: list[str], caplog: pytest.LogCaptureFixture
) -> None:
    """A folder in its place: as with a read-only file system, nothing can be renamed to it, by root neither."""
    (root / cells_cache.NAME).mkdir()
    fresh = results.load(root)
    (kept,) = files.cache_folder().rglob("*.parquet")
    assert kept == cells_cache.places(root)[1]
    reads.clear()
    same(results.load(root), fresh)
    assert reads == []
    caplog.clear()
    shutil.rmtree(files.cache_folder())
    files.cache_folder().write_text("no folder")
    with caplog.at_level(logging.WARNING, "llmsys"):
        same(results.load(root), fresh)
    assert "no cache of results" in caplog.text
    assert not list(root.glob(".*.parquet.*")), "nothing is left of the attempt"


def test_few_records_leave_no_cache(tmp_path: Path) -> None:
    shutil.copytree(COMMITTED / "bench_engines", tmp_path / "bench_engines")
    results.load(tmp_path)
    assert not (tmp_path / cells_cache.NAME).exists()


def test_processes_that_write_the_cache_at_once_leave_a_whole_one(root: Path, reads: list[str]) -> None:
    code = (
        "import sys; from llmsys import cells_cache, results; cells_cache.LEAST = 1\n"
        "for _ in range(3): (cells_cache.places(cells_cache.Path(sys.argv[1]))[0]).unlink(missing_ok=True); "
        "print(len(results.load(sys.argv[1])))"
    )
    started = [subprocess.Popen([sys.executable, "-c", code, str(root)], stdout=subprocess.PIPE) for _ in range(2)]
    number = len(record_files.find(root))
    assert [each.communicate()[0].split() for each in started] == [[str(number).encode()] * 3] * 2
    reads.clear()
    same(results.load(root), reference(root))
    assert len(reads) == number, "of the reference alone"
    assert not list(root.glob(f"{cells_cache.NAME}*.*[0-9]"))


def test_what_cannot_be_read_is_said_each_time(root: Path, capsys: pytest.CaptureFixture[str]) -> None:
    bad = root / "bad" / "record.json"
    bad.parent.mkdir()
    bad.write_text('{"schema": 2}')
    for _ in range(2):
        results.load(root)
        assert capsys.readouterr().err == f"llmsys.results: left out: {bad}: not a record of schema 1\n"


@pytest.mark.parametrize(
    "samples", ['{\n  "a": [\n   1\n  ],\n  "b": 5\n }', "[\n 1\n ]", '{\n  "a": [\n   NaN, x\n  ]\n }', "null"]
)
def test_samples_that_are_none_are_seen_though_they_are_not_kept(tmp_path: Path, samples: str) -> None:
    record = Record(name="a", run_id="b", task="train", status="ok", samples={"a": [1.0]})
    text = record.to_json()
    start = text.index('"samples": ') + len('"samples": ')
    (tmp_path / "record.json").write_text(text[:start] + samples + text[text.index(',\n "files"') :])
    with pytest.raises(ValueError, match=r"record\.json"):
        record_files.record(str(tmp_path / "record.json"), samples=False)


def test_a_setting_called_samples_is_not_taken_for_the_record_s(tmp_path: Path) -> None:
    """It comes first in the file."""
    record = Record(name="a", run_id="b", task="train", status="ok", config={"samples": {"a": [1]}}, samples={"s": [2]})
    path = tmp_path / "record.json"
    inner = '"config": {\n "samples": {\n  "a": [\n   1\n  ]\n },\n "more": 1\n }'
    text = record.to_json()
    text = text.replace(text[text.index('"config"') : text.index(',\n "env"')], inner)
    assert json.loads(text)["config"]["samples"] == {"a": [1]}
    path.write_text(text)
    found = record_files.record(str(path), samples=False)
    assert found is not None
    assert found.config == {"samples": {"a": [1]}, "more": 1}
    assert found.samples == {}
