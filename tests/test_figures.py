"""Figures are of the records: with units, the spread of repeats, the machine's name, and the same bytes each time."""

from __future__ import annotations

import dataclasses
import re
import subprocess
import sys
from functools import cache
from pathlib import Path
from typing import Any

import pytest

from llmsys import figures
from llmsys.figures import __main__ as command
from llmsys.figures import drawing
from llmsys.figures.machine import stamp, where
from llmsys.job import Record

ALL = [(paper, name) for paper, names in figures.PAPERS.items() for name in names]
UNIT = re.compile(
    r"\((GiB|MiB|GB|MB|%.*|ms|s|Mbit/s|Gbit/s|times|steps|examples|bytes / .*|nats a token.*)\)$"
    r"|^tokens/s|^ms of a step$|^learning rate$"  # a rate of learning has no unit
)
REPEATED = [
    *(("bench", name) for name in ("pareto", "phases", "modules", "throughput")),
    *(("compress", name) for name in ("iterations", "ablation", "convergence")),
    *(("decentral", "goodput"), ("lorafa", "quality")),
]
"""Figures of numbers that vary over repeats (steps, rounds, seeds) in the records; accounted bytes do not."""


@cache
def records(paper: str) -> list[Record]:
    return drawing.read(paper)


@cache
def drawn(paper: str, name: str) -> Any:
    return drawing.draw(paper, name, records(paper))


def named(axis: Any) -> bool:
    """Whether an axis has names at its ticks (methods, cells), and so no unit."""
    return type(axis.get_major_formatter()).__name__ in ("FixedFormatter", "FuncFormatter", "StrCategoryFormatter")


@pytest.mark.parametrize(("paper", "name"), ALL)
def test_every_axis_says_what_it_is_and_in_which_unit(paper: str, name: str) -> None:
    panels = [axes for axes in drawn(paper, name).axes if axes.get_visible()]
    assert panels
    for axes in panels:
        assert axes.has_data()
        labels = {axis.get_label_text() for axis in (axes.xaxis, axes.yaxis) if not named(axis)}
        assert labels
        assert [label for label in labels if not UNIT.search(label)] == []


@pytest.mark.parametrize(("paper", "name"), ALL)
def test_a_figure_names_the_machine_that_its_numbers_are_from(paper: str, name: str) -> None:
    text = drawn(paper, name)._supxlabel.get_text()
    verb = "Measured on" if figures.PAPERS[paper][name].measured else "Predicted, computed on"
    assert text.splitlines()[0] == f"{verb} AMD EPYC, 2 cores"  # where all that is published was made


@pytest.mark.parametrize(("paper", "name"), REPEATED)
def test_repeats_are_drawn_with_their_spread(paper: str, name: str) -> None:
    from matplotlib.container import ErrorbarContainer

    bars = [each for axes in drawn(paper, name).axes for each in axes.containers if isinstance(each, ErrorbarContainer)]
    lengths = [path.get_extents().size.max() for bar in bars for lines in bar[2] for path in lines.get_paths()]
    assert any(length > 0 for length in lengths)


def test_another_machine_is_another_name_below_the_figure() -> None:
    """The name comes out of the records, not out of the place where the figure is drawn."""
    env = {"device": "cuda", "device_name": "NVIDIA H100 80GB HBM3", "device_count": 2}
    moved = [dataclasses.replace(record, env=env) for record in records("decentral")]
    figure = drawing.draw("decentral", "goodput", moved)
    assert figure._supxlabel.get_text().splitlines()[0].endswith("2 x NVIDIA H100 80GB HBM3")
    both = where([moved[0], records("decentral")[0], moved[1]])
    assert both == "2 x NVIDIA H100 80GB HBM3; AMD EPYC, 2 cores"
    assert where([dataclasses.replace(moved[0], env={})]) == where([]) == "machine unknown"


def test_a_figure_of_several_revisions_says_so() -> None:
    def said(*shas: str) -> str:
        (record,) = [each for each in records("decentral") if each.task == "decentral_simulate"]
        clean = {**record.env, "git_dirty": False}
        of = [dataclasses.replace(record, env={**clean, "git_sha": sha}) for sha in shas]
        text: str = stamp(pyplot.figure(), of)._supxlabel.get_text()
        return text.partition("\n")[2]

    from matplotlib import pyplot

    assert said("1" * 40) == said("1" * 40, "1" * 40) == ""
    assert said("1" * 40, "1" * 40, "2" * 40) == "Runs of several revisions: 2 of 1111111, 1 of 2222222."


def test_error_bars_of_seeds_are_their_standard_deviation() -> None:
    """Three simulations of each rate of failures, whose points stand beside the mean."""
    import statistics

    (axes,) = drawn("decentral", "goodput").axes
    (record,) = [each for each in records("decentral") if each.task == "decentral_simulate"]
    bar = axes.containers[0]
    halves = [path.get_extents().height / 2 for path in bar[2][0].get_paths()]
    points = sorted((float(key.split("/")[1][:-1]), values) for key, values in record.samples.items())
    assert halves == pytest.approx([statistics.stdev(values) for _, values in points], abs=1e-9)


@pytest.mark.parametrize("ending", drawing.FORMATS)
def test_a_figure_is_the_same_file_each_time(ending: str, tmp_path: Path) -> None:
    """So that a figure in a paper's repository changes when its numbers do."""
    for turn in ("one", "two"):
        figure = drawing.draw("decentral", "goodput", records("decentral"))
        drawing.save(figure, tmp_path / f"{turn}.{ending}")
    first, second = ((tmp_path / f"{turn}.{ending}").read_bytes() for turn in ("one", "two"))
    assert first == second
    assert first[:4] == {"pdf": b"%PDF", "png": b"\x89PNG"}[ending]


def test_the_command_prints_the_files_it_has_written(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert command.main(["decentral", "--out", str(tmp_path)]) == 0
    paths = [Path(line) for line in capsys.readouterr().out.splitlines()]
    assert [path.name for path in paths] == [f"decentral_{name}.pdf" for name in figures.PAPERS["decentral"]]
    assert all(path.stat().st_size > 1000 for path in paths)


def test_what_cannot_be_drawn_is_named_and_the_rest_is_drawn(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = drawing.COMMITTED / "decentral_plan"
    assert command.main(["decentral", "--records", str(folder), "--out", str(tmp_path), "--format", "png"]) == 0
    captured = capsys.readouterr()
    assert captured.out.splitlines() == [str(tmp_path / "decentral_timeline.png")]
    left = captured.err.splitlines()
    assert [line.split()[1] for line in left] == ["over_lines", "against", "goodput"]
    assert "python -m llmsys +exp=decentral_simulate_churn" in left[2]


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["papers"], "papers: no such paper; there are bench, compress, decentral, lorafa"),
        (["lorafa", "memory"], "memory: no such figure of lorafa; there are blocks, peak, quality, rates, saved"),
        (["bench", "--records", "{empty}"], "{empty}: no record.json below it"),
        (["bench", "--records", "{empty}/nowhere"], "{empty}/nowhere: no such folder"),
    ],
)
def test_a_mistake_is_one_line(
    arguments: list[str], said: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert command.main([word.format(empty=tmp_path) for word in arguments]) == 1
    captured = capsys.readouterr()
    assert captured.out == ""
    (line,) = captured.err.splitlines()
    assert line.startswith(f"llmsys.figures: {said.format(empty=tmp_path)}")


def test_help_lists_every_figure_with_its_question_and_loads_nothing_heavy() -> None:
    code = """
import sys
from llmsys.figures import __main__ as command
try:
    command.main(["--help"])
except SystemExit:
    pass
heavy = {"torch", "matplotlib", "pandas", "hydra", "transformers"} & set(sys.modules)
assert not heavy, heavy
"""
    told = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, timeout=60).stdout
    for names in figures.PAPERS.values():
        for name, entry in names.items():
            assert re.search(rf"^    {name} +{re.escape(entry.question)}$", told, re.MULTILINE)
            assert entry.question.endswith("?")
