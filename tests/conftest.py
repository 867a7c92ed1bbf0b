"""What every test needs: no network, no leftovers, one place for results."""

from __future__ import annotations

import gc
import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parent))  # however pytest is started

from rank_pool import Pool

# A million objects of the modules under test live as long as the session, and thousands of configs are composed in it:
# to look through them all for cycles again and again takes a tenth of the suite's time.
OBJECTS = (100_000, 20, 100)

os.environ["HF_HUB_OFFLINE"] = "1"
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")


ALONE = (
    *("comm", "dispatch", "profile", "search", "test_benchmarks", "test_packaging", "test_track"),
    "bench/test_bench_serve_client",
)
DECENTRAL = ("direct", "direct_job", "limits", "link", "probe", "queue", "quota", "storm", "train")
"""Of their folders, those that `make test` runs one by one, behind all others, of which it runs two at a time."""


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    here = Path(__file__).parent
    alone = {*ALONE, *(f"decentral/test_decentral_{each}" for each in DECENTRAL)}
    for item in items:
        path = item.path.relative_to(here).with_suffix("")
        if {path.parts[0], str(path)} & alone:
            item.add_marker("alone")


def pytest_collection_finish() -> None:
    gc.collect()
    gc.freeze()
    gc.set_threshold(*OBJECTS)


def pytest_unconfigure() -> None:
    gc.unfreeze()


@pytest.fixture
def results(tmp_path: Path) -> Path:
    """An empty results folder."""
    return tmp_path / "results"


@pytest.fixture
def llmsys(results: Path) -> Callable[..., subprocess.CompletedProcess[str]]:
    """Runs `python -m llmsys <arguments>` as a user would, with its own results folder."""

    def run(*arguments: str, **environment: str) -> subprocess.CompletedProcess[str]:
        env = {**os.environ, "LLMSYS_RESULTS": str(results), **environment}
        command = [sys.executable, "-m", "llmsys", *arguments]
        return subprocess.run(command, capture_output=True, text=True, env=env, timeout=240, check=False)

    return run


@pytest.fixture(scope="session")
def pool() -> Iterator[Pool]:
    """Two ranks, for all tests.

    DeepSpeed's ZeRO-3 leaves its own F.linear behind, which saves more: who compares saved bytes needs ranks apart.
    """
    made = Pool()
    yield made
    made.close()


@pytest.fixture(scope="session")
def alone() -> Iterator[Pool]:
    """One rank, of the same kind of process."""
    made = Pool(1)
    yield made
    made.close()
