"""What every test needs: no network, no leftovers, one place for results."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parent))  # however pytest is started

from rank_pool import Pool

os.environ["HF_HUB_OFFLINE"] = "1"
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")


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
