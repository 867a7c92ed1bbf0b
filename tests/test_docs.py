"""The documentation is built without a warning or a network, has a page of every experiment, and what it says runs."""

from __future__ import annotations

import html
import os
import re
import subprocess
import sys
from html.parser import HTMLParser
from pathlib import Path

import pytest

from doc_blocks import RUN, Block, blocks, follow
from llmsys import compose
from llmsys.job import Record

ROOT = Path(__file__).parents[1]
DOCS = ROOT / "docs"
TUTORIALS = sorted((DOCS / "tutorials").glob("*.md"))
HOWTOS = sorted((DOCS / "howto").glob("*.md"))
PAGES = [*TUTORIALS, *HOWTOS]
LONG = [page for page in PAGES if any(block.mark == "slow" for block in blocks(page))]


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The whole site, built as `make docs` does, where no request can leave."""
    pytest.importorskip("mkdocs", reason="mkdocs is not installed: pip install 'llmsys[docs]'")
    folder = tmp_path_factory.mktemp("site")
    nowhere = dict.fromkeys(("http_proxy", "https_proxy", "HTTP_PROXY", "HTTPS_PROXY"), "http://127.0.0.1:9")
    environment = {**os.environ, **nowhere, "PYTHONPATH": str(ROOT / "src"), "NO_MKDOCS_2_WARNING": "1"}
    command = [sys.executable, "-m", "mkdocs", "build", "--strict", "--quiet", "--site-dir", str(folder)]
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=240, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    return folder


def text(page: Path) -> str:
    """What a page shows, in one line."""
    return " ".join(html.unescape(re.sub(r"<[^>]+>", " ", page.read_text(encoding="utf-8"))).split())


def test_every_experiment_has_a_page_with_its_header_and_its_record(site: Path) -> None:
    """The purpose is what --help shows; every field of the header is there."""
    purposes = compose.choices("exp")
    assert {path.stem for path in (site / "experiments").glob("*.html")} == {"index", *purposes}
    for name, purpose in purposes.items():
        shown = text(site / "experiments" / f"{name}.html")
        for part in (
            purpose,
            "Paper :",
            "Expected :",
            "Hardware :",
            "Time :",
            f"python -m llmsys +exp={name} smoke=true",
        ):
            assert part in shown, (name, part)
        assert ("No record is committed." in shown) != (ROOT / "benchmarks" / "records" / name).is_dir()


def test_an_experiments_page_shows_its_latest_record(site: Path) -> None:
    folder = ROOT / "benchmarks" / "records" / "pretrain_llama_6m"
    (path,) = folder.glob("*/record.json")
    record = Record.read(path.parent)
    assert record is not None
    shown = text(site / "experiments" / "pretrain_llama_6m.html")
    machine = f"{record.env['cpu']}, {record.env['cores']} cores"
    for part in (record.run_id, machine, record.started[:10], record.env["git_sha"][:12]):
        assert part in shown
    assert f"step_ms_p50 {record.summary['step_ms_p50']:,.6g} ms" in shown
    assert f"accounted_bytes {record.summary['accounted_bytes']:,.6g} bytes" in shown


def test_units_are_those_that_keys_name() -> None:
    pytest.importorskip("mkdocs", reason="mkdocs is not installed: pip install 'llmsys[docs]'")
    hooks = _hooks()
    expected = {
        "step_ms_p50": "ms", "a/b/iteration_ms_p25": "ms", "peak_gib": "GiB", "tokens_per_s": "tokens/s", "mfu": "%",
        "tokens_per_s_per_device": "tokens/s", "accuracy_se": "share", "saved_bytes": "bytes", "timed_steps": "steps",
        "fit/all_reduce/mbit": "Mbit/s", "gemm/32x64x64/fp32/ms": "ms", "world": "", "perplexity": "",
    }  # fmt: skip
    assert {key: hooks.unit(key) for key in expected} == expected


def _hooks():  # type: ignore[no-untyped-def]
    import importlib.util

    spec = importlib.util.spec_from_file_location("docs_hooks", DOCS / "hooks.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


class Loaded(HTMLParser):
    """What a browser fetches of a page by itself."""

    def __init__(self) -> None:
        super().__init__()
        self.found: list[str] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        keys = {"link": "href", "a": ""}.get(tag, "src")
        self.found += [value for key, value in attrs if key == keys and value]


def test_reading_a_page_fetches_nothing_from_elsewhere(site: Path) -> None:
    """No font, script, style or picture of another host; the theme would fetch one for a diagram, so there is none."""
    pages = list(site.rglob("*.html"))
    assert len(pages) > 60
    for page in pages:
        content = page.read_text(encoding="utf-8")
        parser = Loaded()
        parser.feed(content)
        assert parser.found
        assert [url for url in parser.found if re.match(r"(https?:)?//", url)] == []
        assert 'class="mermaid"' not in content
    for style in site.rglob("*.css"):
        assert not re.search(r"(url\(|@import)\s*[\"']?(https?:)?//", style.read_text(encoding="utf-8"))


def test_the_reference_has_every_public_name(site: Path) -> None:
    """Of the packages that say in `__all__` what is public."""
    import importlib

    for package in ("bench", "compress", "decentral", "figures", "lorafa"):
        page = (site / "reference" / f"{package}.html").read_text(encoding="utf-8")
        for name in importlib.import_module(f"llmsys.{package}").__all__:
            assert f'id="llmsys.{package}.{name}"' in page, name


def test_there_is_a_tutorial_for_each_paper_and_a_page_for_what_can_be_added() -> None:
    assert {page.stem for page in TUTORIALS} == {"bench", "compress", "decentral", "lorafa"}
    assert {page.stem.split("-", 2)[2] for page in HOWTOS} == {
        *("compressor", "engine", "experiment", "method", "model")
    }
    for page in PAGES:
        assert [block for block in blocks(page) if block.language in RUN and block.mark != "slow"], page


BRIEF = ("lorafa", "add-an-experiment")
"""Pages that are gone through whenever tests run; the others with those that take minutes."""


@pytest.mark.parametrize(
    "page",
    [pytest.param(page, marks=[] if page.stem in BRIEF else [pytest.mark.slow]) for page in PAGES],
    ids=lambda page: page.stem,
)
def test_what_a_page_shows_runs(page: Path, tmp_path: Path) -> None:
    """What takes long is left out here. A how-to changes a copy of the package."""
    follow(blocks(page), tmp_path, copy=page in HOWTOS, slow=False)


@pytest.mark.slow
@pytest.mark.parametrize("page", LONG, ids=lambda page: page.stem)
def test_all_that_a_page_shows_runs(page: Path, tmp_path: Path) -> None:
    follow(blocks(page), tmp_path, copy=page in HOWTOS, slow=True)


def test_a_page_that_is_wrong_fails(tmp_path: Path) -> None:
    """Or the tests above would hold of anything: a failing command, a line that was not printed, an edit of lines that
    are not there, a fence without a language."""
    for number, wrong in enumerate(
        (
            [Block("", "bash", "", "false\ntrue\n")],
            [Block("", "python", "", "print(1)\n"), Block("output", "text", "", "2\n")],
            [Block("", "text", "a.py", "x = 1\n"), Block("", "diff", "a.py", "-x = 2\n+x = 3\n")],
        )
    ):
        folder = tmp_path / str(number)
        folder.mkdir()
        with pytest.raises(AssertionError):
            follow(wrong, folder, copy=False, slow=False)
    page = tmp_path / "page.md"
    page.write_text("```\nls\n```\n")
    with pytest.raises(ValueError, match="without a language"):
        blocks(page)
    right = [Block("", "text", "a.py", "x = 1\ny = 1\n"), Block("", "diff", "a.py", " x = 1\n-y = 1\n+y = 2\n")]
    follow(right, tmp_path, copy=False, slow=False)
    assert (tmp_path / "a.py").read_text() == "x = 1\ny = 2\n"
