"""The wheel alone is the whole program: built, unpacked elsewhere, and run from an empty folder."""

from __future__ import annotations

import os
import subprocess
import sys
import zipfile
from pathlib import Path

ROOT = Path(__file__).parents[1]


def test_a_wheel_runs_from_an_empty_folder(tmp_path: Path) -> None:
    subprocess.run(
        [sys.executable, "-m", "build", "--wheel", "--no-isolation", "--outdir", str(tmp_path / "dist"), str(ROOT)],
        check=True,
        capture_output=True,
    )
    (wheel,) = (tmp_path / "dist").glob("*.whl")
    site, empty = tmp_path / "site", tmp_path / "empty"
    empty.mkdir()
    with zipfile.ZipFile(wheel) as archive:
        archive.extractall(site)
    env = {**os.environ, "PYTHONPATH": str(site)}

    def command(*arguments: str) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            [sys.executable, *arguments], cwd=empty, env=env, capture_output=True, text=True, check=False
        )

    where = command("-c", "import llmsys, llmsys.compose as c; print(llmsys.__file__, c.CONF)")
    assert where.stdout.split() == [str(site / "llmsys" / "__init__.py"), str(site / "llmsys" / "conf")]
    done = command("-m", "llmsys", "-m", "train.steps=2", "train.length=32", "data.num_examples=40", "train.seed=0,1")
    assert done.returncode == 0, done.stderr
    assert len(list((empty / "results" / "scratch").glob("*/record.json"))) == 2
