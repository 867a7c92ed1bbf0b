from __future__ import annotations

from pathlib import Path

import pytest

from llmsys import data, schema

LABELS = ["combinatorics", "printing", "stats"]


@pytest.fixture(scope="session")
def functions_cache(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """One cache for all tests of this folder, so that the corpus is parsed (5 s) once."""
    return tmp_path_factory.mktemp("cache")


@pytest.fixture(autouse=True)
def _cache(functions_cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LLMSYS_CACHE", str(functions_cache))


@pytest.fixture
def packages() -> data.Source:
    return data.open(schema.Data(kind="code_packages", labels=LABELS))
