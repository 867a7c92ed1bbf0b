"""Claims about published numbers: what a file may say, and what of ours stands beside it."""

from __future__ import annotations

import csv
import io
from pathlib import Path

import pytest
from report_harness import ROOT, cell, on_gpu

from llmsys.bench.cells import techniques
from llmsys.bench.published.__main__ import as_csv, lines, main, show
from llmsys.bench.published.compare import Comparison, compare
from llmsys.bench.published.table import OOM, Table, read
from llmsys.job import Record

FILES = sorted((ROOT / "published").glob("*.csv"))
HEAD = "hardware,model,techniques,batch,length,throughput [tokens/s],peak_memory [GB],source"
ROW = "a800x8,llama2_7b,F+Z3,1,350,12000,40,paper"


def written(folder: Path, *rows: str, head: str = HEAD) -> Table:
    path = folder / "table.csv"
    path.write_text("\n".join(["# a remark", head, *rows]) + "\n", encoding="utf-8")
    return read(path)


def ours(
    text: str = "F+Z3",
    tokens: float = 10000.0,
    gib: float = 50e9 / 2**30,
    *,
    batch: int = 1,
    world: int = 8,
    repeat: int = 0,
    **more: object,
) -> Record:
    """A record of LLaMA-2 7B on 8 A800 at batch 1."""
    keys = {"model.name": "llama2_7b", "model.num_layers": 32, "train.length": 350, **more}
    return on_gpu(cell(text, tokens, batch=batch, world=world, repeat=repeat, keys=keys), peak_gib=gib)


def compared(
    folder: Path, records: list[Record], *rows: str, head: str = HEAD, ignore: tuple[str, ...] = ()
) -> Comparison:
    return compare(written(folder, *rows, head=head), records, ignore)


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.stem)
def test_templates_are_read_and_hold_no_number_of_the_paper_that_nobody_has_read(path: Path) -> None:
    table = read(path)
    filled = [row for row in table.rows if row.numbers]
    assert all(row.source.startswith("third party: ") for row in filled)
    wanted = {"rtx4090x8": 90.8, "rtx3090x8": 85.9} if path.stem.endswith("scaling") else {}
    assert {row.keys["hardware"]: row.numbers["scaling_efficiency [%]"] for row in filled} == wanted


def test_the_templates_have_the_rows_of_the_issue() -> None:
    found = {path.stem.partition("_")[2]: read(path) for path in FILES}
    assert set(found) == {"pretrain_grid", "pretrain_maxbatch", "phases", "modules", "finetune", "scaling"}
    each = {row.keys["techniques"] for row in found["pretrain_grid"].rows}
    assert len(each) == 5 * 8
    assert {"Naive", "F+R+Z3+O+Q", "Z2+O"} <= each
    assert len(found["pretrain_grid"].rows) == len(each) * 4 * 3
    assert {row.keys["length"] for row in found["pretrain_grid"].rows} == {"350"}
    assert {row.keys["r"] for row in found["finetune"].rows} == {"64"}


@pytest.mark.parametrize(
    ("head", "row", "message"),
    [
        (HEAD.replace(" [tokens/s]", ""), ROW, r"column 'throughput' is without its unit: .*throughput \[tokens/s\]"),
        (HEAD.replace("batch", "bach"), ROW, "column 'bach' is unknown; did you mean batch?"),
        (HEAD.replace("throughput", "troughput"), ROW, r"column 'troughput \[tokens/s\]' .* did you mean throughput"),
        (HEAD.replace("[tokens/s]", "[samples/s]"), ROW, "throughput is in tokens/s"),
        (HEAD.replace("[GB]", "[ms]"), ROW, "peak_memory is in GB or GiB"),
        (HEAD.replace("batch", "length"), ROW, "column 'length' stands there twice"),
        (HEAD.replace("source", "module"), ROW, "unknown"),
        ("hardware,model,source", "a800x8,llama2_7b,paper", "needs a column source and one of numbers"),
        (HEAD, ROW.replace("a800x8", "a80x8"), "table.csv:3: hardware 'a80x8' matches nothing; did you mean a800x8"),
        (HEAD, ROW.replace("llama2_7b", "llama_7"), "model 'llama_7' matches nothing; did you mean"),
        (HEAD, ROW.replace("F+Z3", "F+Z4"), "table.csv:3: techniques=F\\+Z4: Z4 is no technique"),
        (HEAD, ROW.replace("F+Z3", "O"), "O is ZeRO's offload"),
        (HEAD, ROW.replace(",1,", ",1.5,"), "batch '1.5' must be a whole number"),
        (HEAD, ROW.replace("12000", "12k"), "'12k' is neither a number"),
        (HEAD, ROW.replace("12000", "nan"), "'nan' is neither a number"),
        (HEAD, ROW.replace("12000", "-3"), "'-3' is neither a number"),
        (HEAD, ROW.replace("paper", ""), "has a number and no source"),
        (HEAD, ROW.replace("paper", "third party:"), "must be 'paper', or 'third party: WHO'"),
        (HEAD, ROW.replace("paper", "me"), "source 'me' must be"),
        (HEAD, ROW + ",1", "has 9 cells; there are 8 columns"),
    ],
)
def test_a_bad_file_is_one_line_that_says_what_would_be_right(
    tmp_path: Path, head: str, row: str, message: str
) -> None:
    with pytest.raises(ValueError, match=message) as raised:
        written(tmp_path, row, head=head)
    assert "\n" not in str(raised.value)
    assert "table.csv" in str(raised.value)


def test_a_row_stands_there_once_a_source(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"table.csv:4: the same keys and source as in line 3"):
        written(tmp_path, ROW, ROW.replace("F+Z3", "z3+f"))
    assert len(written(tmp_path, ROW, ROW.replace("paper", "third party: them")).rows) == 2


def test_an_empty_file_and_a_folder_are_one_line(tmp_path: Path) -> None:
    (tmp_path / "empty.csv").write_text("# nothing\n\n")
    with pytest.raises(ValueError, match="is empty; its first line is"):
        read(tmp_path / "empty.csv")
    for path in (tmp_path / "none.csv", tmp_path):
        with pytest.raises(SystemExit, match=str(path)):
            main(["--published", str(path), str(ROOT / "benchmarks" / "records" / "bench_engines")])


def test_deltas_are_ours_over_theirs_in_one_unit(tmp_path: Path) -> None:
    """10,000 of 12,000 tokens/s; 50 GB of 40 GB, though ours is recorded in GiB."""
    found = compared(tmp_path, [ours()], ROW)
    assert [line.delta for line in found.lines] == [pytest.approx(-100 / 6), pytest.approx(25)]
    assert not found.missing
    assert not found.spare
    as_gib = compared(tmp_path, [ours(gib=50.0)], ROW, head=HEAD.replace("[GB]", "[GiB]"))
    assert as_gib.lines[1].delta == pytest.approx(25)


def test_repeats_are_compared_by_their_mean(tmp_path: Path) -> None:
    records = [ours(tokens=tokens, repeat=i) for i, tokens in enumerate((9000.0, 15000.0))]
    assert compared(tmp_path, records, ROW).lines[0].delta == pytest.approx(0)


@pytest.mark.parametrize(
    "other",
    [
        {"train.length": 512},
        {"model.name": "llama2_13b"},
        {"model.num_layers": 8},  # a 7B with fewer layers is none
        {"text": "F+R+Z3"},
        {"batch": 2},
        {"world": 4},
        {"hardware.nvlink": False},
    ],
)
def test_a_record_of_something_else_is_no_counterpart(tmp_path: Path, other: dict[str, object]) -> None:
    record = ours(**other)  # type: ignore[arg-type]
    assert techniques(record) is not None, "its settings go together"
    found = compared(tmp_path, [record], ROW)
    assert not found.lines
    assert len(found.missing) == len(found.spare) == 1


def test_a_key_can_be_ignored_and_which_one_would_help_is_said(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    records = [on_gpu(ours(), "NVIDIA H100 80GB HBM3")]
    table = written(tmp_path, ROW, ROW.replace("F+Z3", "Z2"))
    found = compare(table, records)
    assert found.without == {"hardware": 1}
    show(table, found)
    said = capsys.readouterr().out
    assert "--ignore hardware), 1 of 2 rows would have one" in said
    assert "a800x8, llama2_7b, batch 1, length 350: F+Z3, Z2" in said
    assert "8 x h100, batch 1, length 350" in said
    assert len(compare(table, records, ["hardware"]).lines) == 2


def test_an_empty_key_is_not_compared(tmp_path: Path) -> None:
    row = "a800x8,llama2_7b,F+Z3,,,12000,40,paper"
    assert len(compared(tmp_path, [ours(), ours(**{"train.length": 512})], row).lines) == 4


def test_out_of_memory_agrees_or_does_not(tmp_path: Path) -> None:
    row = ROW.replace("12000,40", "oom,oom")
    table = written(tmp_path, row)
    assert set(table.rows[0].numbers.values()) == {OOM}
    failed = ours()
    failed.status, failed.reason, failed.summary = "oom", "device memory", {}

    def said(records: list[Record], *rows: str) -> list[str]:
        made = written(tmp_path, *rows)
        return [line[-3] for line in lines(made, compare(made, records).lines)[1]]

    assert said([failed], row) == ["as published"] * 2
    assert said([ours()], row) == ["ours fits"] * 2
    assert said([failed], ROW) == ["–"] * 2
    made = written(tmp_path, ROW)
    assert lines(made, compare(made, [failed]).lines)[1][0][4] == "oom (device memory)"
    assert len(compare(made, [failed, ours()]).lines) == 2, "what ended well stands for the cell"


def test_modules_of_a_paper_can_be_several_of_ours(tmp_path: Path) -> None:
    record = ours("F")
    record.task = record.name = "bench_modules"
    record.summary = {
        f"modules/{row}/forward_ms": ms for row, ms in (("gate", 2.0), ("up", 2.0), ("down", 3.0), ("qkv", 3.0))
    }
    record.summary |= {f"modules/{row}/backward_ms": 2.0 for row in ("gate", "up", "down", "qkv")}
    record.summary |= {"modules/optimizer/ms": 9.0}
    head = "hardware,model,techniques,module,forward [ms],forward_share [%],backward [us],source"
    found = compared(
        tmp_path, [record], "a800x8,llama2_7b,F,mlp,14,60,3000,paper", "a800x8,llama2_7b,F,norm,,,,", head=head
    )
    forward, share, backward = found.lines[:3]
    assert forward.ours == 7.0
    assert share.ours == 70.0
    assert share.delta == pytest.approx(10), "points of a share"
    assert backward.delta == pytest.approx(100)
    assert [line.ours for line in found.lines[3:]] == [None] * 3, "a module that our step has not"
    with pytest.raises(ValueError, match="module 'mpl' matches nothing; did you mean mlp"):
        written(tmp_path, "a800x8,llama2_7b,F,mpl,1,1,1,paper", head=head)


def test_a_table_of_the_largest_batch_takes_ours(tmp_path: Path) -> None:
    head = "hardware,model,techniques,length,largest_batch [examples],throughput [tokens/s],source"
    records = [ours(batch=batch) for batch in (2, 4, 8)]
    failed = ours(batch=16)
    failed.status, failed.summary = "oom", {}
    found = compared(tmp_path, [*records, failed], "a800x8,llama2_7b,F+Z3,350,10,,paper", head=head)
    assert [line.ours for line in found.lines] == [8.0, 10000.0]
    assert found.lines[0].delta == pytest.approx(-20)
    assert not found.spare


def test_scaling_is_compared_in_points(tmp_path: Path) -> None:
    head = "hardware,world,scaling_efficiency [%],source"
    keys = {"model.name": "llama2_7b", "model.num_layers": 32}
    alone, several = (
        on_gpu(cell("F", tokens, batch=1, world=world, keys=keys)) for tokens, world in ((1000.0, 1), (7000.0, 8))
    )
    found = compared(tmp_path, [alone, several], "a800x8,8,90.0,third party: them", "a800x8,2,,", head=head)
    (line,) = found.lines
    assert line.ours == pytest.approx(87.5)
    assert line.delta == pytest.approx(-2.5)
    assert [row.keys["world"] for row in found.missing] == ["2"]


def test_the_csv_has_every_number_of_the_file(tmp_path: Path) -> None:
    table = written(tmp_path, ROW, "a800x8,llama2_7b,Z2,1,350,oom,,paper")
    rows = list(csv.DictReader(io.StringIO(as_csv(table, compare(table, [ours()])))))
    assert [(row["techniques"], row["number"], row["published"]) for row in rows] == [
        ("F+Z3", "throughput", "12000.0"),
        ("F+Z3", "peak_memory", "40.0"),
        ("Z2", "throughput", "oom"),
        ("Z2", "peak_memory", ""),
    ]
    assert float(rows[1]["ours"]) == pytest.approx(50)
    assert rows[2]["run"] == ""
