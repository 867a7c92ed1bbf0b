"""The corpus is asserted, and its cache never decides whether a run works."""

from __future__ import annotations

import hashlib
import importlib.machinery
import logging
import subprocess
import sys
from pathlib import Path

import pytest

from llmsys import files
from llmsys.data import corpus, functions

MODULES = [corpus.Module("sets/a.py", "def f(x):\n    '''Doc.'''\n    y = x\n    return y\n")]


def pretend(monkeypatch: pytest.MonkeyPatch, root: Path | None) -> None:
    spec = None
    if root is not None:
        spec = importlib.machinery.ModuleSpec("sympy", None, origin=str(root / "__init__.py"))
    monkeypatch.setattr(corpus.importlib.util, "find_spec", lambda name: spec)


def test_a_missing_corpus_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    pretend(monkeypatch, None)
    with pytest.raises(ValueError, match=r"^[^\n]*pip install sympy==1\.14\.0$"):
        corpus.modules()


def test_another_version_says_what_to_install(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    (tmp_path / "release.py").write_text('__version__ = "1.13.3"\n')
    pretend(monkeypatch, tmp_path)
    with pytest.raises(ValueError, match=r"1\.13\.3 found.*pip install sympy==1\.14\.0$"):
        corpus.modules()


def test_changed_files_are_noticed(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    (tmp_path / "release.py").write_text('__version__ = "1.14.0"\n')
    pretend(monkeypatch, tmp_path)
    with pytest.raises(ValueError, match=r"differ from sympy 1\.14\.0 as released"):
        corpus.modules()


def test_the_digest_tells_where_one_file_ends() -> None:
    assert corpus.digest({"a": b"xy", "b": b""}) != corpus.digest({"a": b"x", "b": b"y"})
    assert corpus.digest({"a": b"x", "b": b"y"}) == corpus.digest({"b": b"y", "a": b"x"})


def test_the_corpus_is_as_large_as_the_design_says() -> None:
    modules = corpus.modules()
    assert len(modules) == 854
    assert not [module.path for module in modules if "tests" in module.path.split("/")]


def test_a_share_of_files_is_chosen_by_hash_alone() -> None:
    weights = {f"p/{i}.py": 10 for i in range(100)}
    chosen = corpus.choose(weights, 15)
    assert len(chosen) == 15
    assert corpus.choose(dict(reversed(weights.items())), 15) == chosen
    assert corpus.choose({"large": 90, "b": 5, "c": 5}, 15) <= {"b", "c"}
    assert corpus.choose({"a": 50, "b": 60}, 15) == {"a"}
    assert corpus.choose({"alone": 1}, 15) == set()


def test_functions_come_back_from_the_cache_as_they_were_cut(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LLMSYS_CACHE", str(tmp_path / "new"))
    cut = functions.load(MODULES)
    monkeypatch.setattr(functions, "extract", lambda modules: pytest.fail("not from the cache"))
    assert functions.load(MODULES) == cut
    assert [path.suffix for path in (tmp_path / "new").iterdir()] == [".jsonl"]


@pytest.mark.parametrize("damage", [b"", b"half a line", None])
def test_a_damaged_cache_is_logged_and_built_again(
    damage: bytes | None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setenv("LLMSYS_CACHE", str(tmp_path))
    cut = functions.load(MODULES)
    (path,) = tmp_path.iterdir()
    whole = path.read_bytes()
    path.write_bytes(whole[:-5] if damage is None else damage)
    with caplog.at_level(logging.WARNING, "llmsys.data"):
        assert functions.load(MODULES) == cut
    assert "damaged" in caplog.text
    assert path.read_bytes() == whole


def test_a_cache_that_cannot_be_written_is_logged(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """A file in the folder's place: permissions would not stop root, under which tests often run."""
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("LLMSYS_CACHE", str(tmp_path / "file"))
    with caplog.at_level(logging.WARNING, "llmsys.data"):
        assert len(functions.load(MODULES)) == 1
    assert "cannot be written" in caplog.text


def test_processes_that_build_it_at_once_leave_one_whole_cache(tmp_path: Path) -> None:
    code = (
        f"import os; os.environ['LLMSYS_CACHE'] = {str(tmp_path)!r}\n"
        "from llmsys.data import corpus, functions\n"
        "modules = [corpus.Module(f'sets/a{i}.py', 'def f(x):\\n    y = x\\n    return y\\n') for i in range(200)]\n"
        "assert len(functions.load(modules)) == 200\n"
    )
    running = [subprocess.Popen([sys.executable, "-c", code]) for _ in range(3)]
    assert [process.wait(timeout=60) for process in running] == [0, 0, 0]
    (path,) = tmp_path.iterdir()
    head, _, rest = path.read_bytes().partition(b"\n")
    assert head.decode() == hashlib.sha256(rest).hexdigest()


def test_the_cache_lies_where_the_environment_says(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setenv("LLMSYS_CACHE", str(tmp_path / "own"))
    assert files.cache_folder() == tmp_path / "own"
    monkeypatch.delenv("LLMSYS_CACHE")
    assert files.cache_folder() == tmp_path / "llmsys"
    monkeypatch.delenv("XDG_CACHE_HOME")
    assert files.cache_folder() == Path.home() / ".cache" / "llmsys"
