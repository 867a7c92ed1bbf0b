"""The claim of the script that measures how far predicted loads are off: it does so by real runs."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parents[1] / "benchmarks"))


@pytest.mark.slow
def test_loads_of_engines_are_predicted_from_others(tmp_path: Path) -> None:
    import bench_served

    sizes = ["--servers", "static", "--known", "1", "--unseen", "2", "--rounds", "1", "--out", str(tmp_path)]
    found = bench_served.main([*sizes, "smoke=true"])
    assert abs(found.summary["static/2/tpot_ms_p50"]) == found.summary["tpot_ms_p50_error_percent"]
    assert "| static | 2 | " in bench_served.show(found)
