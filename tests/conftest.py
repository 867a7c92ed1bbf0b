"""What every test needs: no network, no leftovers, one place for results."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parent))  # `rank_pool`, however pytest is started

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
