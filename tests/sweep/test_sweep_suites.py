"""Claims about conf/sweep: each suite is a whole sweep by its name alone, over an experiment, and says what it is."""

from __future__ import annotations

import subprocess
import sys

import pytest
import yaml

from llmsys import compose, schema

SUITES = [name for name in compose.choices("sweep") if name != "none"]
CELLS = {"bench_pretrain_grid": 40, "bench_pretrain_maxbatch": 4, "bench_scaling": 6, "bench_finetune_grid": 24}


@pytest.mark.parametrize("suite", SUITES)
def test_a_suite_opens_with_its_header_and_brings_its_experiment(suite: str) -> None:
    lines = (compose.CONF / "sweep" / f"{suite}.yaml").read_text().splitlines()
    assert lines[0] == "# @package _global_"
    for field in ("# Paper:", "# Expected:", "# Hardware:", f"# Command: python -m llmsys sweep={suite}"):
        assert any(line.startswith(field) for line in lines), field
    (exp,) = (each["/exp"] for each in yaml.safe_load("\n".join(lines))["defaults"] if "/exp" in each)
    config = compose.compose([f"sweep={suite}", "sweep.repeats=1"])
    assert config["name"] == exp
    schema.build(config)


def test_the_command_line_beats_the_suite() -> None:
    config = compose.compose(["sweep=bench_pretrain_grid", "sweep.order=shuffled", "train.steps=7", "train.world=1"])
    assert (config["sweep"]["order"], config["sweep"]["prune"]) == ("shuffled", True)
    assert (config["train"]["steps"], config["train"]["global_batch"]) == (7, 1)


@pytest.mark.parametrize(
    "suite", [pytest.param(suite, marks=[pytest.mark.slow] if suite.endswith("_grid") else []) for suite in SUITES]
)
def test_every_cell_of_a_suite_can_be(suite: str) -> None:
    """Of the real launcher: as many cells as are promised, of which each is another run."""
    code = (
        "import sys; from llmsys import main\n"
        "def show(configs):\n"
        "    made = main.make_jobs(configs)\n"
        "    print(len(configs), len(made), len({job.config['techniques'] for job in made}))\n"
        "    return 0\n"
        "main.submit = show\n"
        f"sys.argv = ['llmsys', 'sweep={suite}']\n"
        "main.main()\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    listed, made, _ = map(int, done.stdout.split() or [0, 0, 0])
    assert listed == made == CELLS[suite], done.stderr


def test_two_experiments_at_once_are_a_mistake_in_one_line(llmsys) -> None:  # type: ignore[no-untyped-def]
    done = llmsys("sweep=bench_scaling", "+exp=bench_engines")
    assert done.returncode == 1
    (line,) = done.stderr.strip().splitlines()
    assert "exp=bench_engines" in line
