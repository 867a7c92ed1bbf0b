"""Our methods pass every cell of the robustness grid (`benchmarks/robustness_cells.py`), by the check that its table is
made of; and the grid tells what hangs.
"""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

from llmsys.comm.place import Place
from rank_pool import Pool

sys.path.insert(0, str(Path(__file__).parents[2] / "benchmarks"))

import robustness_cells as cells
import robustness_subjects as subjects

HERE = "test_compress_robustness"


class Alone(subjects.Hooked):
    """Exchanges nothing."""

    def attach(self, resume: Path | None) -> None:
        from torch.distributed.algorithms.ddp_comm_hooks.debugging_hooks import noop_hook

        self.wrap()
        self.ddp.register_comm_hook(None, noop_hook)


def check(place: Place, name: str, subject: str, folder: str, phase: int) -> str:
    """How phase `phase` of a cell ends in this group of ranks."""
    made = {**subjects.SUBJECTS, "alone": Alone}[subject]
    at = cells.At(rank=place.rank, world=place.world, make=made, folder=Path(folder), phase=phase)
    try:
        found = cells.run(name, at)
    except cells.Broken as broken:
        return f"{broken.how}: {broken.what}"
    assert found.get("buckets", 2) > 1
    return "passes"


@pytest.mark.parametrize("name", [name for name, cell in cells.CELLS.items() if set(cell.worlds) == {2}])
@pytest.mark.parametrize("subject", subjects.OURS)
def test_ours_passes(pool: Pool, subject: str, name: str, tmp_path: Path) -> None:
    for phase in range(len(cells.CELLS[name].worlds)):
        assert pool.call(f"{HERE}:check", name, subject, str(tmp_path), phase) == ["passes"] * 2


@pytest.mark.slow
@pytest.mark.parametrize("name", [name for name, cell in cells.CELLS.items() if set(cell.worlds) != {2}])
def test_ours_passes_on_more_ranks(name: str, tmp_path: Path) -> None:
    for phase, world in enumerate(cells.CELLS[name].worlds):
        pool = Pool(world)
        for subject in subjects.OURS:
            folder = tmp_path / subject
            folder.mkdir(exist_ok=True)
            assert pool.call(f"{HERE}:check", name, subject, str(folder), phase) == ["passes"] * world
        pool.close()


@pytest.mark.parametrize(
    ("name", "how"),
    [
        ("unequal seeds", "diverges: replicas are"),
        ("vectors only", "diverges: replicas are"),
        ("inf on one rank", "wrong: steps left out: []"),
    ],
)
def test_a_cell_can_fail(pool: Pool, name: str, how: str, tmp_path: Path) -> None:
    """Ranks that do not talk to each other."""
    assert pool.call(f"{HERE}:check", name, "alone", str(tmp_path), 0)[0].startswith(how)


def test_the_kept_grid_is_of_these_claims_and_ours_passes(capsys: pytest.CaptureFixture[str]) -> None:
    """A claim that has become another since is not what the table says was tried."""
    import compress_robustness

    record = compress_robustness.main(["--kept"])
    assert record.config["claims"] == {name: cell.claim for name, cell in cells.CELLS.items()}
    assert {record.summary[f"{subject}_passes"] for subject in subjects.OURS} == {len(cells.CELLS)}
    assert "| inf on one rank | passes | passes |" in capsys.readouterr().out


@pytest.mark.slow
def test_the_grid_runs(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """In processes of its own; the package of the authors may be there or not."""
    import compress_robustness

    words = ["--cells", "vectors only", "--subjects", "acpsgd", "epfml", "--out", str(tmp_path)]
    record = compress_robustness.main(words)
    assert record.config["results"]["vectors only"]["acpsgd"][0]["how"] == "passes"
    printed = capsys.readouterr().out
    assert "| vectors only | passes | not installed |" in printed or "epfml, vectors only: IndexError" in printed


@pytest.mark.slow
def test_a_hang_is_a_result(tmp_path: Path) -> None:
    """torch's own hook, of which callbacks wait for each other on gloo, where there are several buckets."""
    import robustness_ranks

    outcome = robustness_ranks.check("many buckets, 4 ranks", "torch", tmp_path, 10.0)
    assert outcome.how in ("hangs", "aborts", "raises")
    assert outcome.what
