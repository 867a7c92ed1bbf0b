"""The data sets: the same everywhere, nothing shared between the splits, no label to be read off, clear errors."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from llmsys import data, schema
from llmsys.data import corpus, functions
from llmsys.data.code import DOCSTRING_INSTRUCTION
from llmsys.data.examples import template
from llmsys.data.neutral import Neutraliser, forms

CODE = {
    "code_lm": schema.Data(kind="code_lm"),
    "code_docstrings": schema.Data(kind="code_docstrings"),
    "code_packages": schema.Data(kind="code_packages", labels=["combinatorics", "printing", "stats"]),
}


def alpaca(path: Path, rows: int) -> schema.Data:
    lines = [{"instruction": f"Say {i}.", "input": "" if i % 2 else "loud", "output": f"{i}"} for i in range(rows)]
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    return schema.Data(kind="jsonl", path=str(path))


@pytest.mark.parametrize(
    "cfg",
    [*CODE.values(), schema.Data(kind="synthetic"), schema.Data(kind="synthetic_pairs")],
    ids=lambda cfg: cfg.kind,
)
def test_opening_twice_gives_the_same(cfg: schema.Data) -> None:
    first, second = data.open(cfg), data.open(cfg)
    assert first == second
    assert first.hash == second.hash


def test_the_split_is_the_same_on_every_machine() -> None:
    """Committed, because records of other machines are compared by it."""
    held_out = corpus.validation_modules({module.path: len(module.text) for module in corpus.modules()}, 15)
    assert len(held_out) == 189
    assert data.open(CODE["code_packages"]).hash[:16] == "dcaf0a27c9e4f138"


@pytest.mark.parametrize("cfg", CODE.values(), ids=lambda cfg: cfg.kind)
def test_the_splits_share_no_file(cfg: schema.Data) -> None:
    source = data.open(cfg)
    train, val = ({example.origin for example in split} for split in (source.train, source.val))
    assert train
    assert val
    assert not train & val


def test_every_code_data_set_holds_out_the_same_files() -> None:
    held_out = {e.origin for e in data.open(CODE["code_lm"]).val}
    for kind in ("code_docstrings", "code_packages"):
        assert {e.origin for e in data.open(CODE[kind]).val} <= held_out


def test_every_label_is_in_both_splits_and_texts_are_unique(packages: data.Source) -> None:
    for split in (packages.train, packages.val):
        assert {example.label for example in split} == {0, 1, 2}
    texts = [example.text for example in packages.train + packages.val]
    assert len(set(texts)) == len(texts)


def test_no_label_can_be_read_off_a_text() -> None:
    """Of all sub-packages, not only the chosen labels: `Matrix` in a function of `physics` is a hint too."""
    modules = corpus.modules()
    names = {module.package for module in modules} - {""} | {"sympy"}
    neutral = Neutraliser(names)
    for function in functions.load(modules):
        assert not neutral.left_in(function.body), function


@pytest.mark.parametrize(
    ("before", "after"),
    [
        ("MatrixBase.is_matrix(matrices.dense)", "nameBase.is_name(name.dense)"),
        ("FiniteSet(*sets)", "Finitename(*name)"),
        ("offset = score + dataset", "offset = score + dataset"),
        ("eigenvectors = SymPyDeprecationWarning", "eigenname = nameDeprecationWarning"),
        ("ISet, POLY_poly, geometries", "Iname, name_name, name"),
    ],
)
def test_names_are_replaced_by_form(before: str, after: str) -> None:
    assert Neutraliser(["matrices", "sets", "core", "vector", "sympy", "polys", "geometry"])(before) == after


def test_a_name_has_singular_and_plural() -> None:
    assert {"matrices", "matrix"} <= forms("matrices")
    assert {"geometry", "geometries"} <= forms("geometry")
    assert {"tensor", "tensors"} <= forms("tensor")


def test_a_body_is_the_statements_alone() -> None:
    text = '''
class Ring:
    @property
    def order(self, poly="x"):
        """How many."""
        from sympy.core import (
            Basic,
        )

        def inner():
            "Of a helper."
            import os
            return os
        return Basic(self.polys, inner)
'''
    (function,) = functions.extract([corpus.Module("polys/rings.py", text)])
    assert function.name == "Ring.order"
    assert function.doc == "How many."
    assert function.body == "def inner():\n    return os\nreturn Basic(self.name, inner)"
    assert function.source.startswith('@property\ndef order(self, poly="x"):\n    from sympy.core import (')
    assert "How many" not in function.source


def test_the_docstring_is_not_in_its_prompt() -> None:
    """Over 60 characters: the shorter ones ("Return self.") may well stand in a comment by themselves."""
    source = data.open(CODE["code_docstrings"])
    examples = [example for example in source.train + source.val if len(example.text) > 60]
    assert len(examples) > 5000
    assert not [example for example in examples if example.text in example.prompt]
    before, _, after = template(DOCSTRING_INSTRUCTION, "@").partition("@")
    assert all(example.prompt.startswith(before) and example.prompt.endswith(after) for example in examples)


def test_a_cap_takes_a_sample_of_every_class() -> None:
    cfg = schema.Data(kind="code_packages", labels=["combinatorics", "printing", "stats"], max_train=60, max_val=30)
    source = data.open(cfg)
    assert (len(source.train), len(source.val)) == (60, 30)
    assert {example.label for example in source.train} == {0, 1, 2}


def test_alpaca_lines_become_prompt_and_text(tmp_path: Path) -> None:
    source = data.open(alpaca(tmp_path / "a.jsonl", 40))
    assert len(source.train) + len(source.val) == 40
    assert len(source.val) == 6  # 15 %
    by_text = {example.text: example.prompt for example in source.train + source.val}
    assert by_text["3"] == template("Say 3.", "")
    assert by_text["4"] == template("Say 4.", "loud")
    assert "### Input:\nloud\n\n### Response:\n" in by_text["4"]


def test_equal_lines_are_on_one_side(tmp_path: Path) -> None:
    """Or the validation split would hold what was trained on."""
    cfg = alpaca(tmp_path / "a.jsonl", 20)
    assert cfg.path
    Path(cfg.path).write_text(Path(cfg.path).read_text() * 3)
    source = data.open(cfg)
    assert not {e.text for e in source.train} & {e.text for e in source.val}


@pytest.mark.parametrize(
    ("line", "fault"),
    [
        (b'{"instruction": "a", "output": ', "not JSON"),
        (b'{"instruction": "a"}', "'output' is missing"),
        (b'{"instruction": "a", "output": 3}', "'output' is int"),
        (b'["a", "b"]', "not an object"),
        (b'{"instruction": "\xff", "output": "b"}', "not JSON"),
    ],
)
def test_a_malformed_line_is_named(tmp_path: Path, line: bytes, fault: str) -> None:
    path = tmp_path / "bad.jsonl"
    path.write_bytes(b'{"instruction": "a", "output": "b"}\n\n' + line + b"\n")
    with pytest.raises(ValueError, match=r"bad\.jsonl:3: ") as error:
        data.open(schema.Data(kind="jsonl", path=str(path)))
    assert fault in str(error.value)
    assert "\n" not in str(error.value)


def test_a_json_array_is_recognised(tmp_path: Path) -> None:
    """Alpaca itself is published as one array."""
    path = tmp_path / "alpaca_data.json"
    path.write_text('[\n{"instruction": "a", "output": "b"}\n]')
    with pytest.raises(ValueError, match="one object per line"):
        data.open(schema.Data(kind="jsonl", path=str(path)))


def test_an_empty_split_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="validation split is empty"):
        data.open(alpaca(tmp_path / "one.jsonl", 1))
    with pytest.raises(ValueError, match="training split is empty"):
        data.open(alpaca(tmp_path / "none.jsonl", 0))


def test_labels_that_cannot_be_are_named() -> None:
    with pytest.raises(ValueError, match="matrixes is no sub-package"):
        data.open(schema.Data(kind="code_packages", labels=["core", "matrixes"]))
    with pytest.raises(ValueError, match=r"no function of at least 500 lines in the \w+ split"):
        data.open(schema.Data(kind="code_packages", labels=["core", "sets"], min_lines=500))


@pytest.mark.parametrize("kind", ["code_lm", "code_docstrings"])
def test_some_packages_are_cut_out_of_the_whole_with_its_split(kind: str) -> None:
    """So a model pre-trained on some has seen nothing of the others, nor of its own validation split."""
    whole, part = data.open(schema.Data(kind=kind)), data.open(schema.Data(kind=kind, packages=["physics", "stats"]))
    for all_of_it, some in ((whole.train, part.train), (whole.val, part.val)):
        assert {corpus.package_of(example.origin) for example in some} == {"physics", "stats"}
        theirs = [example for example in all_of_it if corpus.package_of(example.origin) in ("physics", "stats")]
        assert sorted(some, key=repr) == sorted(theirs, key=repr)
    with pytest.raises(ValueError, match=r"^data\.packages: stat is no sub-package of the corpus; there are .*stats"):
        data.open(schema.Data(kind=kind, packages=["stat"]))
    with pytest.raises(ValueError, match=r"^data\.packages: is for data=code_lm or data=code_docstrings, not for"):
        schema.Data(kind="synthetic", packages=["sets"])


def test_a_missing_path_is_named_before_anything_is_read(tmp_path: Path) -> None:
    cfg = schema.Data(kind="jsonl", path=str(tmp_path / "absent.jsonl"))
    for function in (data.open, data.content_hash):
        with pytest.raises(ValueError, match=r"data\.path=.*absent\.jsonl: no such file"):
            function(cfg)


def test_the_hash_follows_the_content(tmp_path: Path) -> None:
    cfg = alpaca(tmp_path / "a.jsonl", 10)
    assert cfg.path
    before = data.content_hash(cfg), data.open(cfg).hash
    Path(cfg.path).write_text(Path(cfg.path).read_text().replace("Say 3", "Tell 3"))
    after = data.content_hash(cfg), data.open(cfg).hash
    assert before[0] != after[0]
    assert before[1] != after[1]
    assert data.content_hash(CODE["code_lm"]) == corpus.HASH
    assert data.content_hash(schema.Data(kind="synthetic")) == ""


def test_synthetic_text_follows_its_seed() -> None:
    cfg = schema.Data(kind="synthetic", num_examples=20)
    assert data.open(cfg, seed=1) == data.open(cfg, seed=1)
    assert data.open(cfg, seed=1).hash != data.open(cfg, seed=2).hash


def test_opening_imports_neither_torch_nor_the_corpus() -> None:
    """What is wrong with the data is to be said within a second."""
    code = (
        "import sys; from llmsys import data, schema; data.open(schema.Data(kind='code_docstrings')); "
        "sys.exit(', '.join({'torch', 'sympy', 'transformers'} & set(sys.modules)) or 0)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


def test_synthetic_pairs_are_as_long_as_alpaca_s() -> None:
    """The two facts that the distribution is made of: 96 % within 256 tokens, and 130 on average."""
    source = data.open(schema.Data(kind="synthetic_pairs", num_examples=4000))
    lengths = [len(example.prompt) + len(example.text) for example in (*source.train, *source.val)]
    assert sum(length <= 256 for length in lengths) / len(lengths) == pytest.approx(0.96, abs=0.01)
    assert sum(lengths) / len(lengths) == pytest.approx(130, abs=3)
    assert all(example.prompt and example.text for example in source.train)
