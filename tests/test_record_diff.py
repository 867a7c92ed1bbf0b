"""Claims about what differs between runs, of which revisions rows are, and the commands that say so."""

from __future__ import annotations

import copy
import dataclasses
import math
import sys
from pathlib import Path

import pytest

from llmsys import plot, record_diff, results
from llmsys.job import Record

ROOT = Path(__file__).parents[1]
RECORDS = ROOT / "benchmarks" / "records"
CLEAN, OTHER = "a" * 40, "b" * 40


def run(run_id: str = "a", *, sha: str = CLEAN, dirty: bool = False, code: str = "code1", **more: float) -> Record:
    (made,) = [each for each in results.read(RECORDS / "lorafa_minilm") if each.config["method"]["kind"] == "full"]
    made = copy.deepcopy(made)
    env = {**made.env, "git_sha": sha, "git_dirty": dirty}
    return dataclasses.replace(made, run_id=run_id, env=env, code_hash=code, summary={**made.summary, **more})


def said(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, *words: str) -> tuple[str, str]:
    """What `python -m llmsys.results` writes to both outputs."""
    monkeypatch.setattr(sys, "argv", ["llmsys.results", *words])
    results.main()
    return capsys.readouterr()


def test_a_run_does_not_differ_from_itself_even_in_nan() -> None:
    one = run(loss=math.nan)
    assert results.diff(one, copy.deepcopy(one)) == []


def test_each_kind_of_difference_is_found_with_absolute_and_relative_numbers_of_the_summary_alone() -> None:
    a, b = run(accuracy=0.5, only_a=1.0), run(accuracy=0.4)
    b.config["train"]["steps"], b.config["results"] = a.config["train"]["steps"] + 1, "elsewhere"
    b.env["packages"]["torch"], b.env["git_sha"], b.env["device_name"] = "3.0", OTHER, "another"
    b.code_hash, b.data_hash, b.started = "code2", "data2", "later"
    found = {(each.group, each.key): each for each in results.diff(a, b)}
    assert set(found) == {
        ("run", "code_hash"),
        ("run", "data_hash"),
        ("settings", "train.steps"),
        ("environment", "packages.torch"),
        ("environment", "git_sha"),
        ("environment", "device_name"),
        ("summary", "accuracy"),
        ("summary", "only_a"),
    }
    accuracy, lacking = found["summary", "accuracy"], found["summary", "only_a"]
    assert accuracy.absolute == pytest.approx(-0.1)
    assert accuracy.relative == pytest.approx(-0.2)
    assert (lacking.b, lacking.absolute, lacking.relative) == (None, None, None)
    assert found["settings", "train.steps"].absolute is None
    assert record_diff.Difference("summary", "x", 0.0, 1.0).relative is None


def test_folders_are_matched_by_settings_whatever_the_machine_resolved_and_each_run_once() -> None:
    a, b = [run("a0"), run("a1")], [run("b0"), run("b1")]
    for each, seed in ((a[1], 1), (b[0], 1), (b[1], 2)):
        each.config["train"]["seed"] = seed
    b[0].config["train"]["threads"], b[0].config["hardware"]["device"] = 64, "cuda"
    pairs, only_a, only_b = record_diff.matched(a, b)
    assert [(one.run_id, other.run_id) for one, other in pairs] == [("a1", "b0")]
    assert [[each.run_id for each in alone] for alone in (only_a, only_b)] == [["a0"], ["b1"]]
    (first, last), alone, _ = record_diff.matched([run("a0"), run("a1"), run("a2")], [run("b0"), run("b1")])
    assert (first[1].run_id, last[1].run_id, len(alone)) == ("b0", "b1", 1)


def test_what_all_pairs_have_alike_is_said_once(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for side, sha in (("A", CLEAN), ("B", OTHER)):
        for seed in (0, 1):
            made = run(f"{side}{seed}", sha=sha, accuracy=0.5 + 0.1 * seed * (side == "B"))
            made.config["train"]["seed"] = seed
            made.leave(tmp_path / side)
    record_diff.main([str(tmp_path / "A"), str(tmp_path / "B")])
    out = capsys.readouterr().out
    assert out.count(OTHER) == 1
    assert "# All 2 pairs" in out
    assert "| summary | accuracy | 0.5 | 0.6 | +0.1 | +20.00 % |" in out
    assert "A0 and lorafa_minilm B0\n\nNo other difference.\n" in out


def test_a_run_is_found_by_its_folder_or_id_and_what_is_neither_is_one_line(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    run("first").leave(tmp_path)
    run("second", loss=9.0).leave(tmp_path)
    monkeypatch.setenv("LLMSYS_RESULTS", str(tmp_path))
    out, _ = said(capsys, monkeypatch, "diff", "first", str(tmp_path / "lorafa_minilm" / "second"))
    assert "| summary | loss |" in out
    with pytest.raises(SystemExit, match=r"^llmsys\.results: third: neither a folder nor the id of a run below"):
        said(capsys, monkeypatch, "diff", "first", "third")
    with pytest.raises(SystemExit, match=r"no such folder, nor is there nowhere \(--root\)"):
        said(capsys, monkeypatch, "diff", "first", "third", "--root", "nowhere")


def test_the_best_by_a_metric_is_the_smallest_loss_and_the_largest_accuracy_and_never_a_nan(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    values = {"0": (math.nan, 0.1), "1": (2.0, 0.9), "2": (1.0, 0.5)}
    made = [run(name, val_loss=loss, accuracy=accuracy) for name, (loss, accuracy) in values.items()]
    assert [each["run_id"] for each in results.best([results.row(each) for each in made], "val_loss")] == ["2"]
    for each in made[1:]:
        each.leave(tmp_path)
    for words in (["--metric", "accuracy", str(tmp_path)], [str(tmp_path), "--metric", "accuracy"]):
        out, _ = said(capsys, monkeypatch, "best", *words, "--csv")
        assert [line.split(",")[0] for line in out.splitlines()] == ["run_id", "1"]
    with pytest.raises(
        SystemExit, match=r"^llmsys\.results: --metric acuracy: no record has it; did you mean accuracy"
    ):
        said(capsys, monkeypatch, "best", "--metric", "acuracy", str(tmp_path))


def test_the_command_markdown_prints_what_the_option_does(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    for folder in ("lorafa_minilm", "compress_iteration"):
        root = str(RECORDS / folder)
        assert said(capsys, monkeypatch, "markdown", root) == said(capsys, monkeypatch, root, "--markdown")


@pytest.mark.parametrize("command", ["diff", "best", "markdown", "compare"])
def test_each_command_has_its_help(
    command: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(SystemExit, match=r"^0$"):
        said(capsys, monkeypatch, command, "--help")
    assert capsys.readouterr().out.startswith(f"usage: python -m llmsys.results {command} ")


def test_rows_of_one_clean_revision_are_not_flagged_and_others_are_counted() -> None:
    one, same, other = run("a"), run("b", code="code2"), run("c", sha=OTHER)
    changed, again = run("d", dirty=True), run("e", dirty=True, code="code2")
    outside, unknown = run("f", sha=""), run("g", sha="", code="")
    assert results.mixed([results.row(each) for each in (one, same)]) == ""
    assert results.mixed([results.row(each) for each in (unknown, unknown)]) == "", "nothing is known, so none is said"
    rows = [results.row(each) for each in (one, same, other, changed, again, outside, unknown)]
    assert results.revisions(rows) == {
        "aaaaaaa": 2,
        "aaaaaaa with changes (code code1)": 1,
        "aaaaaaa with changes (code code2)": 1,
        "bbbbbbb": 1,
        "code code1": 1,
        "no known revision": 1,
    }
    assert results.mixed(rows[:3]) == "Runs of several revisions: 2 of aaaaaaa, 1 of bbbbbbb."
    assert results.mixed(rows[3:4]) == "Runs of a tree with changes: 1 of aaaaaaa with changes (code code1)."


def test_a_frame_and_means_over_seeds_count_the_runs_that_their_rows_count(tmp_path: Path) -> None:
    made = [run(str(seed), sha=sha, dirty=seed == 2) for seed, sha in enumerate((CLEAN, CLEAN, OTHER))]
    for seed, each in enumerate(made):
        each.config["train"]["seed"] = seed
        each.leave(tmp_path)
    rows = [results.row(each) for each in made]
    expected = {"aaaaaaa": 2, "bbbbbbb with changes (code code1)": 1}
    assert results.revisions(rows) == results.revisions(results.load(tmp_path)) == expected
    (mean,) = results.over_seeds(rows)
    assert results.revisions([mean]) == expected
    assert results.mixed([mean]) in results.markdown([mean])
    repeats = results.over_repeats([row | {"repeat": index, "seed": 0} for index, row in enumerate(rows)])
    assert results.mixed(repeats) == results.mixed(rows)


def test_a_table_of_several_revisions_says_so_below_and_is_otherwise_as_it_was(
    capsys: pytest.CaptureFixture[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    one, other = run("a", accuracy=0.5), run("b", accuracy=0.6, sha=OTHER)
    plain = results.markdown([results.row(one), results.row(dataclasses.replace(other, env=one.env))])
    flagged = results.markdown([results.row(one), results.row(other)])
    note = "Runs of several revisions: 1 of aaaaaaa, 1 of bbbbbbb."
    assert flagged == f"{plain}\n\n{note}"
    for each in (one, other):
        each.leave(tmp_path)
    assert said(capsys, monkeypatch, str(tmp_path))[0].endswith(f"\n{note}\n")
    assert note not in said(capsys, monkeypatch, str(tmp_path), "--csv")[0]


def test_a_picture_of_several_revisions_says_so_in_itself(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    drawn: list[str] = []
    scatter = plot.scatter

    def heard(rows: list[results.Row], x: str, y: str, path: Path, note: str = "") -> None:
        drawn.append(note)
        scatter(rows, x, y, path, note)

    monkeypatch.setattr(plot, "scatter", heard)
    both = [results.row(run("a")), results.row(run("b", sha=OTHER))]
    pictures = [tmp_path / "one.png", tmp_path / "two.png"]
    results.plot([both[0], both[0]], "accounted_bytes", "accuracy", pictures[0])
    results.plot(both, "accounted_bytes", "accuracy", pictures[1])
    assert drawn == ["", results.mixed(both)]
    first, second = (path.read_bytes() for path in pictures)
    assert first != second
