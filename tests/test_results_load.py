"""The benchmark of loading records runs, at a size that measures nothing; that frames are equal it asserts itself."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

from llmsys import results

sys.path.insert(0, str(Path(__file__).parents[1] / "benchmarks"))


@pytest.mark.parametrize("of", [pytest.param("train", marks=pytest.mark.slow), "all"])
def test_results_load(tmp_path: Path, capsys: pytest.CaptureFixture[str], of: str) -> None:
    import results_load

    words = ["--records", "20", "--rounds", "2", "--of", of, "--out", str(tmp_path)]
    record = results_load.main(words)
    assert results.read(tmp_path) == [record]
    assert {len(values) for values in record.samples.values()} == {2}
    assert record.summary["columns"] > 200
    assert capsys.readouterr().out == results_load.show(record) + "\n"
    text = (tmp_path / "results_load" / record.run_id / "record.json").read_text()
    assert str(tmp_path) not in text
