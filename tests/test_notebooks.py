"""Notebooks draw what the records say: each is executed in a real kernel, and every picture shows something."""

from __future__ import annotations

import dataclasses
import json
import re
import shutil
import tempfile
from pathlib import Path
from typing import Any

import pytest

from llmsys import results
from llmsys.figures import PAPERS

ROOT = Path(__file__).parents[1]
NOTEBOOKS = sorted((ROOT / "notebooks").glob("*.ipynb"))
LONG = ("bench", "compress", "lorafa")
"""Whose cells take the longest: the short suite runs none of them."""
COUNT = """
import json
from matplotlib.figure import Figure
figures = {id(value): value for value in list(globals().values()) if isinstance(value, Figure)}
def marks(panel):
    return len(panel.patches) + sum(len(line.get_xdata()) for line in panel.lines)
print(json.dumps([[marks(panel) for panel in each.axes if panel.get_visible()] for each in figures.values()]))
"""
"""Run in the kernel after all cells: of each figure that has a name, the number of bars and points in each panel."""


def files() -> set[Path]:
    """What lies where a notebook could leave something, but for Python's caches."""
    places = (*ROOT.iterdir(), *(ROOT / "notebooks").rglob("*"), *(ROOT / "benchmarks").rglob("*"))
    return {path for path in places if not path.name.startswith(".") and "__pycache__" not in path.parts}


def execute(notebook: Any, folder: Path) -> list[Any]:
    """Runs the cells as if started in `folder`, and returns what they put out; an error in one is raised here.

    The kernel is spoken to by sockets in the file system, so no port is opened; their paths must be short (107 bytes),
    which pytest's are not. It writes to that folder alone.
    """
    from nbclient import NotebookClient
    from traitlets.config import Config

    with tempfile.TemporaryDirectory(prefix="nb") as short, pytest.MonkeyPatch.context() as patch:
        for name in ("JUPYTER_RUNTIME_DIR", "JUPYTER_DATA_DIR", "JUPYTER_CONFIG_DIR", "IPYTHONDIR"):
            patch.setenv(name, short)
        config = Config(KernelManager={"transport": "ipc", "ip": f"{short}/kernel"})
        resources = {"metadata": {"path": str(folder)}}
        NotebookClient(notebook, kernel_name="python3", timeout=120, resources=resources, config=config).execute()
    return [output for cell in notebook.cells if cell["cell_type"] == "code" for output in cell["outputs"]]


def test_there_is_a_notebook_for_each_paper() -> None:
    assert {path.stem for path in NOTEBOOKS} == set(PAPERS)


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_a_notebook_opens_with_the_question_it_answers(path: Path) -> None:
    first = json.loads(path.read_text())["cells"][0]
    assert first["cell_type"] == "markdown"
    assert re.fullmatch(r"# [A-Z].*\?", first["source"][0].strip())


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_a_notebook_has_every_figure_of_its_paper(path: Path) -> None:
    """And none besides: what the command line writes is what the notebook shows."""
    source = "".join("".join(cell["source"]) for cell in json.loads(path.read_text())["cells"])
    drawn = re.findall(r'figures\.draw\("(\w+)", "(\w+)"', source)
    assert drawn == [(path.stem, name) for name in PAPERS[path.stem]]


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_a_notebook_is_kept_without_outputs(path: Path) -> None:
    """They would go stale beside the records, and hold paths and dates of one machine."""
    cells = [cell for cell in json.loads(path.read_text())["cells"] if cell["cell_type"] == "code"]
    assert not any(cell["outputs"] or cell["execution_count"] for cell in cells)


@pytest.mark.parametrize(
    "path",
    [pytest.param(path, marks=pytest.mark.slow if path.stem in LONG else []) for path in NOTEBOOKS],
    ids=lambda path: path.stem,
)
def test_a_notebook_draws_the_records(path: Path) -> None:
    """All of it, from its own folder, as Jupyter starts it."""
    import nbformat

    notebook = nbformat.read(path, as_version=4)
    notebook.cells.append(nbformat.v4.new_code_cell(COUNT))
    before = files()
    *outputs, count = execute(notebook, path.parent)
    assert files() == before
    assert not [output for output in outputs if output.get("name") == "stderr"]
    marks = json.loads(count["text"])
    pictures = [output for output in outputs if "image/png" in output.get("data", {})]
    assert len(marks) == len(pictures) > 0  # so each picture is one of those counted
    assert all(panels and all(panels) for panels in marks), marks


@pytest.mark.parametrize(
    "path",
    [pytest.param(path, marks=pytest.mark.slow if i else []) for i, path in enumerate(NOTEBOOKS)],
    ids=lambda path: path.stem,
)
def test_a_notebook_finds_the_records_from_the_root(path: Path) -> None:
    """Its cells as far as the one that has read them."""
    import nbformat

    notebook = nbformat.read(path, as_version=4)
    first = next(i for i, cell in enumerate(notebook.cells) if "figures.read(" in cell["source"])
    notebook.cells = notebook.cells[: first + 1]
    assert execute(notebook, ROOT)


def test_bars_are_as_long_as_the_record_says() -> None:
    """Of every method: the sum of the origins drawn is the total that hooks counted."""
    from llmsys.lorafa.ledger import figures

    for record in results.read(ROOT / "benchmarks" / "records" / "lorafa_ledger"):
        panel = figures.blocks([record]).axes[0]
        names = [label.get_text() for label in panel.get_yticklabels()]
        assert {"full", "peft_lora", "lora/none", "lorafa/none"} <= set(names)
        ends = dict.fromkeys(names, 0.0)
        for bar in panel.patches:
            ends[names[round(bar.get_y() + bar.get_height() / 2)]] += bar.get_width()
        assert ends == pytest.approx({name: record.summary[f"block/mha/0/{name}/total"] for name in names})


def test_nothing_to_draw_is_said() -> None:
    from llmsys.lorafa.ledger import figures

    for draw in (lambda: figures.blocks([]), lambda: figures.whole([], "peak")):
        with pytest.raises(ValueError, match=r"\+exp=lorafa_ledger"):
            draw()


def test_the_comparison_goes_before_the_older_experiments(tmp_path: Path) -> None:
    """A family with runs in `lorafa_quality` is drawn from it; the encoder without any, from the older experiments."""
    from llmsys.job import Record
    from llmsys.lorafa import quality

    for name in (quality.RATES, quality.SEEDS):
        shutil.copytree(ROOT / "benchmarks" / "records" / name, tmp_path / name)
    families = {
        name: {"name": name, "metric": "val_loss", "unit": "nats", "higher": False} for name in ("causal", "encoder")
    }
    summary, samples = {}, {}
    for key, rates, seeds in (("causal/lora", [1e-3, 2e-3], [0, 1]), ("encoder/lora", [], [])):
        summary |= {f"{key}/accounted_bytes": 3.0 * 2**20, f"{key}/lr": 1e-3}
        samples |= {f"{key}/rates": rates, f"{key}/by_rate": [1.5, 1.7][: len(rates)], f"{key}/diverged": [5e-2]}
        samples |= {f"{key}/seeds": seeds, f"{key}/by_seed": [1.4, 1.8][: len(seeds)]}
    samples["encoder/lora/diverged"] = []
    config = {"families": families, "grid": [1e-3, 2e-3, 5e-2]}
    folder = tmp_path / quality.QUALITY / "one"
    folder.mkdir(parents=True)
    whole = Record(name=quality.QUALITY, run_id="one", task="benchmark", status="ok", config=config)
    dataclasses.replace(whole, summary=summary, samples=samples).write(folder)

    found = quality.comparisons(results.read(tmp_path))
    assert [each.family["name"] for each in found] == ["causal", "encoder"]
    assert [each.source == quality.QUALITY for each in found] == [True, False]
    assert set(found[1].lines) == {"full", "lora_peft", "lorafa_peft"}
    point = quality.over_memory(found).axes[0].lines[0]
    assert (*point.get_xdata(), *point.get_ydata()) == pytest.approx((3.0, 1.6))
    curve = quality.over_rates(found).axes[0].lines[0]
    assert list(zip(*curve.get_data(), strict=True)) == [(1e-3, 1.5), (2e-3, 1.7)]  # and no point for 5e-2
    with pytest.raises(ValueError, match="lorafa_quality"):
        quality.over_rates([])
