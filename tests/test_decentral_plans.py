"""The benchmark of plans runs, and its record says of each kind of fleet how it fared."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parents[1] / "benchmarks"))


@pytest.mark.slow
def test_it_leaves_a_record_whose_plans_are_never_worse(tmp_path: Path) -> None:
    import decentral_plans
    from llmsys.job import Record

    made = decentral_plans.main(["--fleets", "3", "--layers", "2", "--no-large", "--out", str(tmp_path)])
    assert Record.read(tmp_path / made.name / made.run_id) == made
    for kind in ("datacentre", "cloud", "homes"):
        assert made.summary[f"{kind}/fleets"] == 1
        assert made.summary[f"{kind}/worse"] == 0
        assert 0 < made.summary[f"{kind}/of_bound_median"] <= 1 + 1e-9, "a bound is a bound"
        assert made.summary[f"{kind}/plan_ms"] > 0
    assert "| datacentre | 1 |" in decentral_plans.show(made)
