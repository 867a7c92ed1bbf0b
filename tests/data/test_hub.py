"""Folders of the `datasets` library: every format gives the same examples, and nothing in a folder is executed."""

from __future__ import annotations

import pickle
from pathlib import Path
from typing import Any

import pytest

from llmsys import compose, data, schema
from llmsys.data import blocks
from llmsys.data.examples import template

datasets = pytest.importorskip("datasets")

NAMED = sorted(path.stem for path in (compose.CONF / "data").glob("*.yaml") if "\nmake:" in path.read_text())
REVIEWS = {
    "train": [{"sentence": f"film {i}", "second": f"seen {i}", "label": ["good", "bad"][i % 2]} for i in range(8)],
    "validation": [{"sentence": f"new film {i}", "second": f"seen {i}", "label": "bad"} for i in range(3)],
}


def config(path: Path, **settings: Any) -> schema.Data:
    columns = {"text": "sentence", "label": "label"}
    return schema.Data(**{"kind": "hub", "path": str(path), "val_split": "validation", "columns": columns, **settings})


def write(folder: Path, form: str, splits: dict[str, list[dict[str, Any]]] | None = None) -> Path:
    """A folder of one of the four formats, as `datasets` itself writes it."""
    made = {name: datasets.Dataset.from_list(rows) for name, rows in (splits or REVIEWS).items()}
    folder.mkdir(exist_ok=True)
    if form == "saved":
        datasets.DatasetDict(made).save_to_disk(str(folder))
    for name, dataset in made.items():
        if form == "parquet":
            dataset.to_parquet(str(folder / f"{name}-00000-of-00001.parquet"))
        elif form == "csv":
            dataset.to_csv(str(folder / f"{name}.csv"))
        elif form == "jsonl":
            (folder / name).mkdir()
            dataset.to_json(str(folder / name / "part.jsonl"))
    return folder


@pytest.fixture(autouse=True)
def _quiet() -> None:
    datasets.disable_progress_bars()


def test_every_format_gives_the_same_examples(tmp_path: Path) -> None:
    found = [data.open(config(write(tmp_path / form, form))) for form in ("saved", "parquet", "csv", "jsonl")]
    assert found[0].labels == ("bad", "good")
    assert (len(found[0].train), len(found[0].val)) == (8, 3)
    assert {(e.text, e.label) for e in found[0].train} == {(f"film {i}", 1 - i % 2) for i in range(8)}
    assert len({source.hash for source in found}) == 1


@pytest.mark.parametrize("form", ["saved", "parquet"])
def test_classes_are_numbered_as_their_feature_says(tmp_path: Path, form: str) -> None:
    """Not in the order of the alphabet, or a fine-tuned model's classes would be swapped."""
    feature = datasets.ClassLabel(names=["not_duplicate", "duplicate"])
    rows = {"train": [{"sentence": "a", "label": 1}, {"sentence": "b", "label": 0}]}
    made = datasets.Dataset.from_list(rows["train"]).cast_column("label", feature)
    if form == "saved":
        datasets.DatasetDict({"train": made, "validation": made}).save_to_disk(str(tmp_path))
    else:
        for name in ("train", "validation"):
            made.to_parquet(str(tmp_path / f"{name}.parquet"))
    source = data.open(config(tmp_path))
    assert source.labels == ("not_duplicate", "duplicate")
    assert {(e.text, e.label) for e in source.train} == {("a", 1), ("b", 0)}


def test_labels_that_are_numbers_are_sorted_by_size(tmp_path: Path) -> None:
    rows = [{"sentence": f"{i}", "label": i} for i in (10, 2, 9)]
    for form in ("csv", "jsonl"):
        source = data.open(config(write(tmp_path / form, form, {"train": rows, "validation": rows})))
        assert source.labels == ("2", "9", "10")


def test_two_texts_and_a_class(tmp_path: Path) -> None:
    columns = {"text": "sentence", "text_pair": "second", "label": "label"}
    source = data.open(config(write(tmp_path, "parquet"), columns=columns))
    assert {(e.text, e.pair) for e in source.train} == {(f"film {i}", f"seen {i}") for i in range(8)}


def test_a_dotted_name_reads_inside_a_column(tmp_path: Path) -> None:
    rows = [{"translation": {"en": f"house {i}", "ro": f"casa {i}"}} for i in range(4)]
    columns = {"source": "translation.en", "target": "translation.ro"}
    cfg = config(write(tmp_path, "saved", {"train": rows, "validation": rows}), columns=columns, prefix="to Romanian: ")
    source = data.open(cfg, "seq2seq")
    assert {(e.prompt, e.text) for e in source.train} == {(f"to Romanian: house {i}", f"casa {i}") for i in range(4)}
    assert {e.prompt for e in data.open(cfg, "causal_lm").val} == {f"to Romanian: house {i}\n" for i in range(4)}


def test_a_prefix_without_a_source_is_refused() -> None:
    with pytest.raises(ValueError, match=r"data\.prefix='sst2: ': is for a source text"):
        config(Path("anywhere"), prefix="sst2: ")


def test_instructions_have_alpacas_template_and_an_input_may_be_missing(tmp_path: Path) -> None:
    rows = [{"ask": "Add.", "given": "1 and 2", "answer": "3"}, {"ask": "Say hi.", "given": None, "answer": "hi"}]
    columns = {"instruction": "ask", "input": "given", "output": "answer"}
    cfg = config(write(tmp_path, "jsonl", {"train": rows, "validation": rows}), columns=columns)
    assert {(e.prompt, e.text) for e in data.open(cfg).train} == {
        (template("Add.", "1 and 2"), "3"),
        (template("Say hi.", ""), "hi"),
    }


def test_without_a_validation_split_equal_rows_are_on_one_side(tmp_path: Path) -> None:
    rows = [{"sentence": f"text {i % 20}", "label": i % 2} for i in range(60)]
    source = data.open(config(write(tmp_path, "parquet", {"train": rows}), val_split=None))
    assert len(source.val) == 9  # 15 %
    assert not {e.text for e in source.train} & {e.text for e in source.val}


class Bomb:
    """Unpickled, it leaves a file."""

    def __init__(self, marker: Path) -> None:
        self.marker = marker

    def __reduce__(self) -> Any:
        return Path.touch, (self.marker,)


def test_pickles_and_scripts_in_a_folder_are_never_executed(tmp_path: Path) -> None:
    marker, folder = tmp_path / "executed", tmp_path / "set"
    folder.mkdir()
    (folder / "train.pkl").write_bytes(pickle.dumps(Bomb(marker)))
    for name in ("set.py", "train.py", "__init__.py"):
        (folder / name).write_text(f"open({str(marker)!r}, 'w')")
    with pytest.raises(ValueError, match=r"no file of the split train .*there are none that is read"):
        data.open(config(folder))
    write(folder, "jsonl")
    assert len(data.open(config(folder)).train) == 8
    assert not marker.exists()
    pickle.loads((folder / "train.pkl").read_bytes())  # noqa: S301 - it would have been noticed
    assert marker.exists()


@pytest.mark.parametrize("name", NAMED)
def test_a_named_data_set_says_where_it_is_expected_and_how_it_is_made(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("LLMSYS_DATA", str(tmp_path))
    cfg = schema.Data(**compose.compose([f"data={name}"])["data"])
    for function in (data.open, data.content_hash):
        with pytest.raises(ValueError, match="no such f") as error:
            function(cfg)
        message = str(error.value)
        assert "\n" not in message
        assert f"data.path={cfg.path}" in message
        assert message.endswith(cfg.make.replace("{path}", str(cfg.path)))


def test_all_the_papers_data_sets_are_named() -> None:
    glue = {f"glue_{name}" for name in ("cola", "sst2", "mrpc", "qqp", "mnli", "qnli", "rte")}
    assert set(NAMED) == glue | {"wmt16_en_ro", "alpaca", "metamath", "cifar10"}


def test_a_hub_id_without_a_network_is_one_line(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path)
    cfg = config(Path("nobody/nothing"))
    assert data.content_hash(cfg) == "nobody/nothing"
    with pytest.raises(LookupError, match=r"data\.path=nobody/nothing: no folder here") as error:
        data.open(cfg)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("row", "fault"),
    [
        ({"sentence": None, "label": "bad"}, r"sentence \(data\.columns\.text\) is NoneType, not text"),
        ({"sentence": "a", "label": "new"}, "the label 'new' is none of the 2 classes of the training split"),
        ({"sentense": "a", "label": "bad"}, r"no column sentence \(data\.columns\.text\); there are sentense, label"),
    ],
)
def test_a_row_that_does_not_fit_is_named(tmp_path: Path, row: dict[str, Any], fault: str) -> None:
    cfg = config(write(tmp_path, "jsonl", {"train": REVIEWS["train"], "validation": [row]}))
    with pytest.raises(ValueError, match=rf"part\.jsonl:1: {fault}"):
        data.open(cfg)


def test_a_split_without_labels_cannot_be_used(tmp_path: Path) -> None:
    """GLUE's test splits have -1 everywhere, which as an index would be the last class."""
    feature = datasets.Features({"sentence": datasets.Value("string"), "label": datasets.ClassLabel(names=["n", "y"])})
    made = datasets.Dataset.from_list([{"sentence": "a", "label": -1}], features=feature)
    datasets.DatasetDict({"train": made, "validation": made}).save_to_disk(str(tmp_path))
    with pytest.raises(ValueError, match=r"train row 1: the label -1 is none of the 2 classes"):
        data.open(config(tmp_path))


def test_regression_is_refused(tmp_path: Path) -> None:
    rows = [{"sentence": "a", "label": 3.8}]
    with pytest.raises(ValueError, match=r"the label is float; .*\(no regression\)"):
        data.open(config(write(tmp_path, "parquet", {"train": rows, "validation": rows})))


def test_a_folder_without_the_split_says_what_is_there(tmp_path: Path) -> None:
    write(tmp_path / "saved", "saved")
    with pytest.raises(ValueError, match=r"no split dev .*there are \['train', 'validation'\]"):
        data.open(config(tmp_path / "saved", val_split="dev"))
    write(tmp_path / "files", "csv")
    with pytest.raises(ValueError, match=r"no file of the split valid .*there are train\.csv, validation\.csv"):
        data.open(config(tmp_path / "files", val_split="valid"))
    write(tmp_path / "files", "parquet")
    with pytest.raises(ValueError, match=r"the split train is there twice"):
        data.open(config(tmp_path / "files"))
    with pytest.raises(ValueError, match=r"data\.subset=sst2: is for a hub id"):
        data.open(config(tmp_path / "saved", subset="sst2"))


@pytest.mark.parametrize("name", ["train.parquet", "train.csv"])
def test_a_damaged_file_is_named(tmp_path: Path, name: str) -> None:
    (tmp_path / name).write_bytes(b'sentence,label\n"a\xff",bad\n')
    with pytest.raises(ValueError, match=rf"{name}.*: not ") as error:
        data.open(config(tmp_path, val_split=None))
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("form", ["saved", "parquet", "csv", "jsonl"])
def test_the_run_id_follows_the_content_alone(tmp_path: Path, form: str) -> None:
    cfg = config(write(tmp_path / "one", form))
    before = data.content_hash(cfg)
    (tmp_path / "one" / "README.md").write_text("beside it")
    assert data.content_hash(cfg) == before
    assert data.content_hash(config(write(tmp_path / "copy", form))) == before
    changed = {**REVIEWS, "train": [{**row, "label": "bad"} for row in REVIEWS["train"]]}
    assert data.content_hash(config(write(tmp_path / "other", form, changed))) != before


def test_of_a_large_file_both_ends_and_the_size_count(tmp_path: Path) -> None:
    path, size = tmp_path / "large", blocks.BLOCK * blocks.BLOCKS + 5
    found = set()
    for length, place in ((size, None), (size + 1, None), (size, 0), (size, size // 2), (size, size - 1)):
        with path.open("wb") as file:
            file.truncate(length)
            if place is not None:
                file.seek(place)
                file.write(b"x")
        found.add(blocks.file_hash(path))
    assert len(found) == 5
