"""Claims about tables: units, order, seeds, and rows that are kept though the run failed."""

from __future__ import annotations

import dataclasses
import json
import subprocess
import sys
from pathlib import Path

import pytest

from llmsys import compose, results, spread
from llmsys.job import Record
from llmsys.sweep.scaling import efficiency, over_rounds


def record(
    method: str, seed: int = 0, status: str = "ok", data_hash: str = "d", scale: float = 1.0, **summary: float
) -> Record:
    overrides = (f"method={method}", f"train.seed={seed}", f"train.lr_scale={scale}")
    config = compose.compose(["+exp=lorafa_minilm", *overrides])
    return Record(
        name="lorafa_minilm",
        run_id=f"{method}{seed}{scale}",
        task="train",
        status=status,
        reason="" if status == "ok" else "host memory",
        config=config,
        data_hash=data_hash,
        summary=dict(summary),
    )


def accuracy(value: float, **more: float) -> dict[str, float]:
    return {"accuracy": value, "accuracy_se": 0.01, "macro_f1": value, "accounted_bytes": 3 * 2**20, **more}


def test_the_best_is_first_and_the_failed_keep_their_row() -> None:
    made = record("full", status="oom"), record("majority", **accuracy(0.2)), record("probe", **accuracy(0.5))
    rows = [results.row(r) for r in made]
    headers, lines = results.table(rows)
    assert [line[headers.index("method")] for line in lines] == ["probe", "majority", "full"]
    assert [line[headers.index("status")] for line in lines] == ["ok", "ok", "oom (host memory)"]
    assert "status" not in results.table(rows[1:])[0], "of runs that are all ok it would say nothing"
    assert lines[0][headers.index("accuracy % ± SE")] == "50.0 ± 1.0"
    assert lines[0][headers.index("accounted memory MiB")] == "3.0"


def test_data_of_other_content_is_marked() -> None:
    rows = [results.row(record("probe", **accuracy(0.5))), results.row(record("full", data_hash="e", **accuracy(0.6)))]
    assert "data_hash" in results.table(rows)[0]


def test_seeds_are_averaged_and_the_best_rate_is_chosen() -> None:
    values = {(0.4, 0): 0.5, (0.4, 1): 0.7, (1.0, 0): 0.65, (1.0, 1): 0.65, (1.0, 2): 0.65}
    rows = [results.row(record("full", seed, scale=scale, **accuracy(v))) for (scale, seed), v in values.items()]
    merged = results.over_seeds(rows)
    found = [(m["seeds"], round(m["accuracy"], 3), round(m["accuracy_sd"], 3)) for m in merged]
    assert found == [(2, 0.6, 0.141), (3, 0.65, 0.0)]
    (chosen,) = results.best(merged, "accuracy")
    assert chosen["lr"] == pytest.approx(2e-4)
    (lowest,) = results.best([{**m, "val_loss": m["accuracy"]} for m in merged], "val_loss")
    assert lowest["val_loss"] == pytest.approx(0.6)


def test_runs_that_differ_in_more_than_the_seed_are_not_averaged_and_say_in_what() -> None:
    made = [record("full", seed, **accuracy(0.5)) for seed in (0, 1)]
    longer = [record("full", seed, **accuracy(0.6)) for seed in (0, 1)]
    for each in longer:
        each.config["train"]["steps"] = 500
    merged = results.over_seeds([results.row(r) for r in (*made, *longer)])
    assert [m["seeds"] for m in merged] == [2, 2]
    headers, lines = results.table(merged)
    assert sorted(line[headers.index("train.steps")] for line in lines) == ["250", "500"]


def test_odd_records_keep_their_row_and_spoil_no_table(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folders = [tmp_path / name for name in ("good", "bare", "other")]
    for folder in folders:
        folder.mkdir()
    record("full", **accuracy(0.6)).write(folders[0])
    Record(name="bare", run_id="b", task="train", status="crashed", reason="signal").write(folders[1])
    (folders[2] / "record.json").write_text('{"schema": 2}')
    for number, damage in enumerate(({"summary": []}, {"summary": {"step_ms": "fast"}}, {"samples": 5}, {"name": 1})):
        (tmp_path / str(number)).mkdir()
        text = json.dumps({**json.loads(record("full").to_json()), **damage})
        (tmp_path / str(number) / "record.json").write_text(text)
    rows = [results.row(r) for r in results.read(tmp_path)]
    assert "crashed (signal)" in results.markdown(rows)
    said = capsys.readouterr().err
    assert said.count("left out") == 5
    assert "0/record.json: summary: is not what a record of schema 1 has there" in said


def test_a_resumed_run_says_from_where_it_was_timed() -> None:
    resumed = record("full", **accuracy(0.6))
    resumed.resumed_from_step = 100
    assert "ok, timed from step 100" in results.markdown([results.row(resumed)])


def measured(network: str = "eth1g", **more: object) -> Record:
    """Of a task whose numbers are no columns of a common table."""
    name = "none/bucket=4,overlap,r=4,batch=32"
    summary = {f"{name}/{key}": 285.0 for key in ("iteration_ms", "iteration_ms_p25", "iteration_ms_p75")}
    made = dataclasses.replace(record("full"), name="compress_iteration", task="compress_iteration", summary=summary)
    made.config = compose.compose(["+exp=compress_iteration", f"network={network}"])
    made.env = {"network": {"shaped": True}}
    return dataclasses.replace(made, run_id=network, world=4, **more)


def printed(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, *arguments: str) -> tuple[str, str]:
    """What `python -m llmsys.results` writes to both outputs."""
    monkeypatch.setattr("sys.argv", ["llmsys.results", *arguments])
    results.main()
    return capsys.readouterr()


def test_runs_with_tables_of_their_own_show_those(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """In a row of the common table there was no number of theirs, and a method that means nothing there."""
    for made in (measured("eth1g"), measured("eth100m")):
        (tmp_path / made.run_id).mkdir()
        made.write(tmp_path / made.run_id)
    for options in ([], ["--markdown"]):
        out, _ = printed(capsys, monkeypatch, str(tmp_path), *options)
        assert out.count("| none | 4 |") == out.count("285.0 (285.0 to 285.0)") == 2
        assert "# compress_iteration, ddp x 4, eth100m" in out
        assert "full" not in out
    (tmp_path / "failed").mkdir()
    measured(status="crashed", reason="signal").write(tmp_path / "failed")
    out, _ = printed(capsys, monkeypatch, str(tmp_path), "--markdown")
    assert out.splitlines()[2] == "| crashed (signal) |"
    assert out.count("| none | 4 |") == 2
    (tmp_path / "trained").mkdir()
    record("lorafa_peft", **accuracy(0.6)).write(tmp_path / "trained")
    out, err = printed(capsys, monkeypatch, str(tmp_path), "--markdown")
    assert len(out.splitlines()) == 4, "the failed one keeps its row"
    assert "lorafa_peft" in out
    assert "full" not in out
    assert f"compress_iteration: 2 records: python -m llmsys.compress.measure {tmp_path}" in err


def test_a_finished_measurement_prints_no_row_of_one_cell(capsys: pytest.CaptureFixture[str]) -> None:
    results.show([measured()])
    assert capsys.readouterr().out == ""


def test_a_wide_table_is_whole_where_the_output_is_no_terminal(capsys: pytest.CaptureFixture[str]) -> None:
    """As a pipe's: it has no width. A setting that a run's groups do not have is a dash."""
    made = [record("full", **accuracy(0.5)), record("probe", **accuracy(0.6))]
    for i in range(25):
        made[0].config["task"][f"a_setting_with_a_long_name_{i}"] = "and a value as long"
    made[1].config["method"]["kind"] = "full"
    results.show(made)
    out = capsys.readouterr().out
    assert "a_setting_with_a_long_name_24" in out
    assert "…" not in out
    assert "None" not in out


@pytest.mark.parametrize(
    ("found", "label"),
    [({"shaped": True}, "eth1g"), ({"shaped": False}, "eth1g (unshaped)"), ({}, "eth1g (not known)")],
)
def test_a_link_is_called_what_was_recorded_of_it(found: dict[str, bool], label: str) -> None:
    """Of a run whose launcher was killed nothing was: a rank may have had its link."""
    made = record("full")
    made.config = compose.compose(["network=eth1g", "engine=ddp", "train.world=2"])
    made.env = {"network": found} if found else {}
    assert results.row(made)["network"] == label


def test_reference_rows_have_no_learning_rate() -> None:
    assert results.row(record("probe"))["lr"] is None
    assert results.row(record("full"))["lr"] == pytest.approx(2e-4)


def test_the_command_prints_tables_and_draws_pictures(tmp_path: Path) -> None:
    for method, value in (("full", 0.6), ("probe", 0.5)):
        folder = tmp_path / method
        folder.mkdir()
        record(method, **accuracy(value)).write(folder)

    def command(*arguments: str) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            [sys.executable, "-m", "llmsys.results", *arguments], capture_output=True, text=True, check=False
        )

    assert "accounted memory MiB" in command(str(tmp_path)).stdout
    assert command(str(tmp_path), "--markdown").stdout.startswith("| method |")
    head, *body = command(str(tmp_path), "--csv").stdout.splitlines()
    assert "accounted_bytes" in head.split(",")
    assert len(body) == 2
    drawn = command(str(tmp_path), "--plot", "accounted_bytes:accuracy")
    assert Path(drawn.stdout.strip()).read_bytes().startswith(b"\x89PNG")
    wrong = command(str(tmp_path), "--plot", "accounted_bytes:acuracy")
    assert wrong.returncode == 1
    assert "accuracy" in wrong.stderr
    nothing = command(str(tmp_path / "full" / "nowhere"))
    assert nothing.returncode == 1
    assert "no such folder" in nothing.stderr


def test_a_data_frame_has_identity_summary_and_config(tmp_path: Path) -> None:
    record("full", **accuracy(0.6)).write(tmp_path)
    frame = results.load(tmp_path)
    assert frame.loc[0, "accuracy"] == 0.6
    assert frame.loc[0, "config.train.length"] == 96


def test_repeats_become_one_row_with_students_interval_and_noise_is_flagged() -> None:
    """Of five step times with a standard deviation of 10 %: t(4) = 2.776."""
    times = [90.0, 95.0, 100.0, 105.0, 110.0]
    rows = [
        results.row(record("full", step_ms_p50=ms, tokens_per_s=1e5 / ms)) | {"repeat": i} for i, ms in enumerate(times)
    ]
    rows.append(results.row(record("full", 1, step_ms_p50=100.0)))
    merged, other = results.over_repeats(rows)
    assert (merged["repeats"], other["repeats"]) == (5, 1), "another seed is another cell"
    assert merged["step_ms_p50"] == 100
    assert merged["step_ms_p50_sd"] == pytest.approx(7.9057, rel=1e-4)
    assert merged["step_ms_p50_ci95"] == pytest.approx(2.7764 * 7.9057 / 5**0.5, rel=1e-4)
    assert merged["step_ms_p50_cv"] == pytest.approx(0.079057, rel=1e-4)
    headers, lines = results.table([merged, other])
    assert sorted(line[headers.index("step's CV %")] for line in lines) == ["0.0", "7.9 !"]


def test_repeats_of_other_code_are_another_row() -> None:
    """It measured something else, and the mean of both would be of neither."""
    made = [record("full", step_ms_p50=ms, tokens_per_s=1e5 / ms) for ms in (100.0, 102.0, 50.0)]
    codes = ("old", "old", "new")
    rows = [results.row(dataclasses.replace(each, code_hash=code)) for each, code in zip(made, codes, strict=True)]
    merged = results.over_repeats([each | {"repeat": i} for i, each in enumerate(rows)])
    assert [(each["code_hash"], each["repeats"], each["step_ms_p50"]) for each in merged] == [
        ("old", 2, 101.0),
        ("new", 1, 50.0),
    ]
    headers, lines = results.table(merged)
    assert sorted(line[headers.index("code_hash")] for line in lines) == ["new", "old"]
    assert "code_hash" not in results.table(merged[:1])[0]
    assert "code_hash" not in results.table(rows)[0], "runs by themselves are told apart by what was asked of them"
    assert "code_hash" in results.to_csv(rows).splitlines()[0].split(",")
    (seeds,) = results.over_seeds([each | {"seed": i} for i, each in enumerate(rows)])
    assert (seeds["seeds"], seeds["code_hash"]) == (3, "")


@pytest.mark.parametrize(("freedom", "t"), [(1, 12.706205), (2, 4.302653), (4, 2.776445), (29, 2.045230)])
def test_students_quantile_is_the_table_s(freedom: int, t: float) -> None:
    assert spread.student(freedom) == pytest.approx(t, abs=1e-6)


def test_efficiency_is_a_rank_s_share_over_one_rank_alone_whatever_engine_that_one_had() -> None:
    def at(world: int, engine: str, tokens: float, **more: object) -> results.Row:
        config = {"train.world": world, "train.global_batch": world, "engine.kind": engine, "hardware.device": "cpu"}
        return {**results.row(record("full", tokens_per_s=tokens)), "config": {**config, **more}}

    rows = [
        at(1, "local", 100.0),
        at(2, "ddp", 180.0),
        at(2, "fsdp2", 150.0),
        at(4, "ddp", 240.0, **{"train.length": 9}),
    ]
    assert [(row["config"]["train.world"], share) for row, share in efficiency(rows)] == [(1, 1.0), (2, 0.9)]
    assert efficiency([rows[0] | {"code_hash": "other"}, rows[1]])[1:] == [], "nor a quotient across codes"


def test_efficiency_has_an_interval_over_rounds_and_drift_is_in_none_of_them() -> None:
    """The machine becomes half as fast from the first round to the third, and the shares scatter by 2 %: t(2) is
    4.303. A reference cell that was measured once more has no counterpart."""

    def at(world: int, repeat: int, tokens: float) -> results.Row:
        config = {"train.world": world, "engine.kind": "ddp", "hardware.device": "cpu", "repeat": repeat}
        row = results.row(record("full", tokens_per_s=tokens))
        return {**row, "config": config, "repeat": repeat, "engine": f"ddp x {world}"}

    rounds = [(100.0, 0.88), (75.0, 0.90), (50.0, 0.92)]
    rows = [at(1, i, alone) for i, (alone, _) in enumerate(rounds)]
    rows += [at(2, i, 2 * alone * share) for i, (alone, share) in enumerate(rounds)]
    alone, both = over_rounds([*rows, at(1, 3, 50.0)])
    assert (alone.rounds, alone.efficiency) == (3, spread.Spread(1.0, 0.0, 0.0, 0.0))
    assert both.rounds == 3
    assert both.efficiency.mean == pytest.approx(0.9)
    assert both.efficiency.half == pytest.approx(4.302653 * 0.02 / 3**0.5, rel=1e-5)
    assert over_rounds([row for row in rows if row["config"]["train.world"] == 2]) == [], "nobody was alone"


def test_published_numbers_are_compared_by_the_same_command(tmp_path: Path) -> None:
    """What a file means is `llmsys.bench.published`'s; here it is found, and a bad one is one line."""
    root = Path(__file__).parents[1]
    records = str(root / "benchmarks" / "records" / "bench_engines")
    good, bad = root / "published" / "2311.03687_scaling.csv", tmp_path / "bad.csv"
    bad.write_text("hardware,speed [tokens/s],source\na800x8,,\n")

    def command(path: Path) -> subprocess.CompletedProcess[str]:
        words = [sys.executable, "-m", "llmsys.results", "compare", "--published", str(path), records]
        return subprocess.run(words, capture_output=True, text=True, check=False)

    done = command(good)
    assert (done.returncode, done.stderr) == (0, "")
    assert "0 of 12 rows have a record of ours" in done.stdout
    assert "rtx4090x8, world 8" in done.stdout
    done = command(bad)
    assert (done.returncode, done.stdout) == (1, "")
    assert done.stderr.startswith("llmsys.results: ")
    assert "speed [tokens/s]" in done.stderr
    assert done.stderr.count("\n") == 1
